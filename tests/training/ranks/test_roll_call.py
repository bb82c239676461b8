"""The message that names lost ranks."""

from ssmpretrain.training.ranks.roll_call import lost_message


def test_several_lost_ranks_are_counted_with_the_first_few() -> None:
    message = lost_message({1: "node01, process 4", 2: "node01, process 5"}, 8, 41_237)
    assert message.startswith("8 ranks do not answer any more at step 41,237: killed, crashed or stuck: 1 (node01, ")
    assert ", ..." in message
