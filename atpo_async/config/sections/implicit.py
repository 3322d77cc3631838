"""The implicit reward model that may be trained beside the policy."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from atpo_async.config.sections.base import Section


class ImplicitRewardConfig(Section):
    """An implicit process reward model, trained by the learner on each batch before the policy is (iStar, arXiv
    2509.19199; docs/methods.md).  It begins as the policy, and takes as much memory again."""

    enabled: bool = Field(False, description="pay single turns by a reward model that is trained along")
    beta: float = Field(0.05, gt=0, description="of a turn's reward: times log pi_phi - log pi_old, over its tokens")
    alpha: float = Field(1.0, ge=0, description="of the turns' normalised rewards, beside the outcome's advantage")
    lr: float = Field(1e-6, gt=0, description="of the model's own AdamW; one step a batch")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
