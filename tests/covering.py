"""Which of the cases of a test `make test` takes, and `make test-all` alone: pytest's --everything.

@pytest.mark.covering(3)          of the product of its parameters as few as have each value 3 times
@pytest.mark.covering("pairs")    ... each pair of values of two of them
@pytest.mark.everything           this test, or this case of it, alone with --everything
"""

from collections import Counter, defaultdict
from itertools import combinations

from pytest import Item

MARKS = (
    "covering(times): so few cases of the product of parameters as have each value so often, or all 'pairs'",
    "everything: alone with --everything",
)


def left_out(items: list[Item]) -> set[Item]:
    """What `make test` does not take."""
    out = {item for item in items if item.get_closest_marker("everything")}
    products = defaultdict(list)
    for item in items:
        if item not in out and item.get_closest_marker("covering"):
            products[item.nodeid.partition("[")[0]].append(item)
    for product in products.values():
        (times,) = product[0].get_closest_marker("covering").args
        # Of one list of values, so the same value is the same object; there are some of no order and no hash.
        cases = [[(name, id(x)) for name, x in sorted(item.callspec.params.items())] for item in product]
        if times == "pairs":
            times, cases = 1, [combinations(case, 2) for case in cases]
        kept = chosen([*map(frozenset, cases)], times)
        out |= {item for i, item in enumerate(product) if i not in kept}
    return out


def chosen(cases: list[frozenset], times: int) -> set[int]:
    """Indices of cases, sets of values, that have each value `times` times, or as often as it occurs.

    Greedy: that with the most values that are still too few, of those that whose values are the rarest.
    """
    wanted = {value: min(times, n) for value, n in Counter(v for case in cases for v in case).items()}
    had, kept, rest = Counter(), set(), set(range(len(cases)))

    def lacking(case: frozenset) -> int:
        return sum(had[value] < wanted[value] for value in case)

    while rest:
        best = max(rest, key=lambda i: (lacking(cases[i]), -sum(had[v] for v in cases[i]), -i))
        if not lacking(cases[best]):
            break
        had.update(cases[best])
        kept.add(best)
        rest.remove(best)
    return kept
