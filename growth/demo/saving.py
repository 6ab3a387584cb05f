"""What a run saves: the cost at which it has the loss that its baseline ends with.

A run's curve is a list of {"step", "flops", "seconds", "loss"}; its own cost, of growing, aligning or
learning, comes first:

    cost = start + curve at the first crossing of the baseline's last loss, linear between measurements
    saved = 1 - cost / (the baseline's whole cost)
"""

COSTS = ("flops", "seconds")


def reach(curve: list[dict], loss: float) -> dict[str, float] | None:
    """FLOPs and seconds at which the curve first is at `loss` or below; None where it never is."""
    before = None
    for point in curve:
        if point["loss"] <= loss:
            if before is None:
                return {cost: point[cost] for cost in COSTS}
            x = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return {cost: before[cost] + x * (point[cost] - before[cost]) for cost in COSTS}
        before = point
    return None


def whole(run: dict) -> dict[str, float]:
    """FLOPs and seconds of all of a run, the start's included."""
    return {cost: run["start"][cost] + run["curve"][-1][cost] for cost in COSTS}


def compare(run: dict, baseline: dict) -> dict:
    """reached: FLOPs and seconds, the start's included; saved: shares of the baseline's. None if never."""
    reached, cost_of_all = reach(run["curve"], baseline["curve"][-1]["loss"]), whole(baseline)
    if reached:
        reached = {cost: reached[cost] + run["start"][cost] for cost in COSTS}
    saved = {cost: 1 - reached[cost] / cost_of_all[cost] for cost in COSTS} if reached else None
    return {"reached": reached, "saved": saved}
