"""The section `progressive_layer_drop`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import NotNegative, Section, Share


class ProgressiveLayerDropConfig(Section):
    """Layers that are skipped at random, more of them as training goes on."""

    enabled: bool = Field(default=False, description="Skip layers.")
    theta: Share = Field(default=1.0, description="Part of layers that is kept in the end.")
    gamma: NotNegative = Field(default=0.001, description="Speed of the change, per step.")
