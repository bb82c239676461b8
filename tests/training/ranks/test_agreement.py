"""The message that names ranks with differing options."""

from ssmpretrain.training.ranks.agreement import difference, flat


def test_the_odd_rank_is_named_with_its_host_and_both_values() -> None:
    ranks = [{"mask_ratio": "0.75", "data": "a1"} for _ in range(64)]
    ranks[3] = {"mask_ratio": "0.6", "data": "a1"}
    hosts = [f"node{rank // 8:02d}" for rank in range(64)]
    assert "rank 3 (node00): mask_ratio is 0.6, on the other 63 ranks 0.75\n" in difference(hosts, ranks)


def test_where_two_differ_the_first_counts_as_right_and_a_missing_option_is_said() -> None:
    message = difference(["a", "b"], [{"seed": "0", "extra": "1"}, {"seed": "1"}])
    assert "rank 1 (b): seed is 1, on rank 0 0" in message and "rank 1 (b): extra is not set, on rank 0 1" in message
    assert "rank 0 (a)" not in message


def test_a_thousand_odd_ranks_are_counted_and_not_listed() -> None:
    ranks = [{"seed": str(rank % 2)} for rank in range(2001)]
    assert difference(["host"] * 2001, ranks).count("\n") < 12 and "and 992 more" in difference(["host"] * 2001, ranks)


def test_options_are_compared_by_their_full_names_and_not_by_addresses_in_memory() -> None:
    here, there = ({"a": {"b": [1, 2], "c": object()}} for _ in range(2))
    assert flat(here) == flat(there) and flat(here)["a.b"] == "[1, 2]"
