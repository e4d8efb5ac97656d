"""The Extender shows how far it is, unless it is told not to."""

from __future__ import annotations

import pytest
from test_moextend_extender import MIXTRAL, measure, quiet


@pytest.mark.parametrize("is_silent", [False, True], ids=["shown", "disabled"])
def test_both_counts_show_a_progress_bar_that_can_be_disabled(is_silent, tmp_path, capsys):
    measure(MIXTRAL.build(), tmp_path, args=quiet(tmp_path, disable_tqdm=is_silent))
    shown = capsys.readouterr().err
    for moment in ("before", "after"):
        assert (f"expert selection {moment}: 100%" in shown) is not is_silent
    assert ("3/3" in shown) is not is_silent
