"""Looking at data: what a dataset holds, the text in it, and what raw text will become."""
