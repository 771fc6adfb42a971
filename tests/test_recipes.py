"""docs/recipes.md says of each config what it is."""

import ast
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from supmim_jax import cli

PAGE = Path(REPOSITORY, "docs", "recipes.md").read_text()
SECTIONS = re.findall(
    r"^## [^\n]*: (configs/\w+)\.py\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(("config", "text"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_the_column_of_ours_is_the_config(config, text):
    values = cli.load(f"{REPOSITORY}/{config}.py").to_dict()
    rows = re.findall(r"^\| `([\w.]+)` \|[^|]*\| `([^`|]+)` \|", text, re.MULTILINE)
    assert len(rows) == text.count("\n| `") >= 15
    for field, ours in rows:
        found = values
        for name in field.split("."):
            found = found[name]
        wanted = ast.literal_eval(ours)
        assert (type(found), found) == (type(wanted), wanted), field


def test_every_config_with_a_recipes_name_has_its_table():
    assert len(SECTIONS) == PAGE.count("\n## ") == 7
