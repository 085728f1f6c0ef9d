"""nbval with tolerance: decimals may differ a little where the text around them is the same (`paper.agreement`)."""

from typing import Any

from nbval.plugin import IPyNbCell

from chassis_utils.paper.agreement import texts_agree

compare_exactly = IPyNbCell.compare_outputs


def snap(new: Any, stored: Any) -> Any:
    """`new`, with every text replaced by the stored one that it agrees with."""
    if isinstance(new, str) and isinstance(stored, str):
        return stored if texts_agree(new, stored) else new
    if isinstance(new, dict) and isinstance(stored, dict):
        return type(new)({key: snap(value, stored.get(key)) for key, value in new.items()})
    return new


def compare_outputs(cell: IPyNbCell, test: list[Any], ref: list[Any], skip_compare: Any = None) -> bool:
    """Compare as nbval does, warnings left out and close decimals snapped to the stored ones."""
    new, stored = ([output for output in outputs if output.get("name") != "stderr"] for outputs in (test, ref))
    snapped = [snap(*pair) for pair in zip(new, stored, strict=False)]
    return compare_exactly(cell, snapped + new[len(stored) :], stored, skip_compare)


IPyNbCell.compare_outputs = compare_outputs
