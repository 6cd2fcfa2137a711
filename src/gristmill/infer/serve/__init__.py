"""`gristmill serve`: a model behind the OpenAI API.

`requests` reads what clients ask, `engine` writes the replies, many at a time, on a thread of its
own, `replies` says them in the API's words, `app` joins the three and `server` listens.
"""
