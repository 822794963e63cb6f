"""The section `progressive_layer_drop`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import NotNegative, Section, Share


class ProgressiveLayerDropConfig(Section):
    """Progressive layer dropping: layers are skipped at random, more of them as training goes on."""

    enabled: bool = Field(default=False, description="Passes the probability of keeping a layer to forward.")
    theta: Share = Field(
        default=1.0,
        description="Probability of keeping a layer that is approached in the end, between 0 and 1.",
    )
    gamma: NotNegative = Field(
        default=0.001, description="Rate at which theta is approached, per training step."
    )
