"""Several processes in one run: launching, agreement before the first step, lost ranks, sharding by FSDP2.

It imports training.checkpoints, training.optim, encoders.weights and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.training.ranks.agreement import RankAgreement, RanksDisagree
    from ssmpretrain.training.ranks.fsdp import FSDP2
    from ssmpretrain.training.ranks.reductions import RankReductions
    from ssmpretrain.training.ranks.roll_call import LostRanks, RankLost

__all__ = ["FSDP2", "LostRanks", "RankAgreement", "RankLost", "RankReductions", "RanksDisagree"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FSDP2": "fsdp",
        "LostRanks": "roll_call",
        "RankAgreement": "agreement",
        "RankLost": "roll_call",
        "RankReductions": "reductions",
        "RanksDisagree": "agreement",
    },
    former=("ssmpretrain.base.ranks",),
)
