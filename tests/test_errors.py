"""What raises a UserError everywhere."""

from __future__ import annotations

import sys

import pytest

from rlhf_lightning.errors import UserError, needs


@pytest.mark.parametrize(("module", "package"), [("crowdkit.aggregation", "crowd-kit"), ("openai", "openai")])
def test_a_missing_extra_is_named(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    with pytest.raises(UserError, match=rf"^{package} is not installed: pip install 'rlhf-lightning\[judge\]'$"):
        needs(module, "judge")
    assert needs("json", "judge") is sys.modules["json"]
