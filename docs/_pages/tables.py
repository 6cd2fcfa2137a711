"""Pages of what is shipped as data: models, recipes, layouts of corpora."""

from __future__ import annotations

import yaml

from gristmill.config import recipes
from gristmill.data.raw import layouts
from gristmill.models import zoo
from gristmill.models.counts import num_parameters
from gristmill.models.zoo.listing import short


def models_page() -> str:
    """Every named model, a table for each family."""
    parts = [
        "# Named models",
        "What `gristmill pretrain list --verbose` prints. Any other model of these families loads "
        "from its `config.json`; a family of your own is [one file](../adding-a-family.md).",
    ]
    by_family: dict[str, list[str]] = {}
    for name, model in zoo.models().items():
        config = model.config
        by_family.setdefault(config.family, []).append(
            f"| `{name}` | {short(num_parameters(config))} | {config.num_layers} "
            f"| {config.hidden_size:,} | {config.num_heads}/{config.kv_heads} "
            f"| {config.max_seq_length:,} |"
        )
    head = ["| name | parameters | layers | width | heads/kv | context |"]
    head.append("|---|---:|---:|---:|---:|---:|")
    for family in zoo.FAMILIES.values():
        rows = by_family.get(family.name)
        if rows:
            parts += [f"## {family.name}", f"`{family.architecture}` in `transformers`."]
            parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts) + "\n"


def recipes_page() -> str:
    """Every bundled recipe: what its opening comment says, and its settings."""
    parts = [
        "# Recipes",
        "Settings of whole runs, shipped with gristmill: `--config NAME`. A URL or path in "
        "LitGPT's `config_hub` means the recipe of the same name. Options after `--config` "
        "override it.",
    ]
    for name in recipes.names():
        text = (recipes.RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8")
        yaml.safe_load(text)
        parts += [f"## {name}", f"```yaml\n{text.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def layouts_page() -> str:
    """Every layout of `gristmill prepare`."""
    frames = {
        "bos": "BOS before",
        "eos": "EOS after",
        "both": "EOS after, BOS before if it is another token",
    }
    rows = [
        f"| [`{layout.name}`](../corpora/{layout.name}.md) | {layout.description} "
        f"| `{layout.pattern}` | {_field(layout)} | {frames[layout.first]} |"
        for layout in layouts.LAYOUTS.values()
    ]
    return "\n".join(
        [
            "# Layouts",
            "",
            "What `gristmill prepare list` prints, with what each takes from its files and what it "
            "puts around a document. Each has a page with its commands.",
            "",
            "| layout | input | files | text | around a document |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _field(layout: layouts.Layout) -> str:
    return f"`{layout.text_field}`" if layout.records == "records" else "the file"


def pages() -> dict[str, str]:
    """All pages of this file, by their place on the site."""
    return {
        "reference/models.md": models_page(),
        "reference/recipes.md": recipes_page(),
        "reference/layouts.md": layouts_page(),
    }
