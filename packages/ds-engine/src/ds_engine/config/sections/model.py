"""The whole configuration: `ds_config.json` as a typed value."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from ds_engine.config.sections.activation_checkpointing import ActivationCheckpointingConfig
from ds_engine.config.sections.aio import AioConfig
from ds_engine.config.sections.autotuning import AutotuningConfig
from ds_engine.config.sections.checkpoint import CheckpointConfig
from ds_engine.config.sections.compile import CompileConfig
from ds_engine.config.sections.compress.compression import CompressionConfig
from ds_engine.config.sections.compress.weight_quantization import InferenceWeightsConfig
from ds_engine.config.sections.data.curriculum import LegacyCurriculumConfig
from ds_engine.config.sections.data.data_efficiency import DataEfficiencyConfig
from ds_engine.config.sections.elasticity import ElasticityConfig
from ds_engine.config.sections.hybrid_engine import HybridEngineConfig
from ds_engine.config.sections.monitor import CometConfig, CsvConfig, TensorBoardConfig, WandbConfig
from ds_engine.config.sections.optimizer import OptimizerConfig
from ds_engine.config.sections.parallel.expert_parallel import ExpertParallelConfig
from ds_engine.config.sections.parallel.pipeline import PipelineConfig
from ds_engine.config.sections.parallel.tensor_parallel import TensorParallelConfig
from ds_engine.config.sections.precision import Bf16Config, DataTypesConfig, Fp16Config, TorchAutocastConfig
from ds_engine.config.sections.profiling import CommsLoggerConfig, FlopsProfilerConfig, TimersConfig
from ds_engine.config.sections.progressive_layer_drop import ProgressiveLayerDropConfig
from ds_engine.config.sections.removed import (
    AmpConfig,
    EigenvalueConfig,
    NebulaConfig,
    QuantizeTrainingConfig,
)
from ds_engine.config.sections.scheduler import SchedulerConfig
from ds_engine.config.sections.sparse_attention import SparseAttentionConfig
from ds_engine.config.sections.zero.optimization import ZeroOptimizationConfig
from ds_engine.config.support.batch import Batch, resolve
from ds_engine.config.support.errors import ConfigError
from ds_engine.config.support.origin import Origin
from ds_engine.config.support.section import Count, Flag, NotNegative, Positive, Section, lowered

WireDtype = Annotated[Literal["fp16", "bf16", "fp32"], BeforeValidator(lowered)]


def _infinity_is_never(value: Any) -> Any:
    """Accelerate writes infinity for "print nothing"."""
    return 0 if isinstance(value, float) and value == math.inf else value


class DsConfig(Section):
    """Top level of `ds_config.json`. Read it with `ds_engine.config.load`, which explains mistakes better
    than this class does.
    """

    train_batch_size: Positive | None = Field(
        default=None,
        description="Samples per optimizer step over all ranks: train_micro_batch_size_per_gpu x "
        "gradient_accumulation_steps x ranks. "
        "Any one or two of the three may be left out, except that gradient_accumulation_steps alone is not "
        "enough.",
    )
    train_micro_batch_size_per_gpu: Positive | None = Field(
        default=None, description="Samples per forward pass on one rank."
    )
    gradient_accumulation_steps: Positive | None = Field(
        default=None, description="Micro-batches per optimizer step. Default: 1, or what the other two give."
    )
    managed_gradient_accumulation: bool = Field(
        default=True,
        description="The engine counts micro-batches, and only every gradient_accumulation_steps-th step() "
        "updates; false: every step() does.",
    )
    optimizer: OptimizerConfig | None = Field(
        default=None, description="Built when none is passed to initialize()."
    )
    scheduler: SchedulerConfig | None = Field(
        default=None, description="Built when none is passed to initialize(). Default: a constant rate."
    )
    fp16: Fp16Config = Field(default_factory=Fp16Config, description="Mixed precision in float16.")
    bf16: Bf16Config = Field(default_factory=Bf16Config, description="Mixed precision in bfloat16.")
    torch_autocast: TorchAutocastConfig = Field(
        default_factory=TorchAutocastConfig, description="torch.autocast around forward."
    )
    data_types: DataTypesConfig = Field(
        default_factory=DataTypesConfig, description="Dtypes of sums, parameters and buffers."
    )
    amp: AmpConfig = Field(default_factory=AmpConfig, description="NVIDIA Apex.")
    zero_optimization: ZeroOptimizationConfig = Field(
        default_factory=ZeroOptimizationConfig, description="How the model is divided among ranks."
    )
    gradient_clipping: NotNegative = Field(
        default=1.0,
        description="Largest global 2-norm of the gradient; a larger gradient is scaled down to it. 0 turns "
        "it off.",
    )
    prescale_gradients: bool = Field(
        default=False, description="Divide gradients before they are added over ranks, not after."
    )
    gradient_predivide_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0,
        description="Part of the division that comes before the sum, with prescale_gradients false.",
    )
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], BeforeValidator(lowered)] = Field(
        default="mean", description="Whether gradients are averaged or added over ranks."
    )
    communication_data_type: WireDtype | None = Field(
        default=None, description="Dtype in which gradients travel. Default: as they are computed."
    )
    seq_parallel_communication_data_type: WireDtype = Field(
        default="fp32", description="Dtype of sums over sequence-parallel ranks."
    )
    sparse_gradients: bool = Field(
        default=False, description="Stage 0: send only the rows of embeddings that have a gradient."
    )
    disable_allgather: bool = Field(default=False, description="Publish parameters by broadcasts.")
    zero_allow_untested_optimizer: Flag = Field(
        default=False, description="Accept optimizers that DeepSpeed has not been tried with."
    )
    zero_force_ds_cpu_optimizer: bool = Field(
        default=True, description="With offload_optimizer, accept no optimizer object but the host's own."
    )
    steps_per_print: Annotated[Count | None, BeforeValidator(_infinity_is_never)] = Field(
        default=None,
        description="Optimizer steps between two lines of progress on rank 0. Default, and 0: none.",
    )
    wall_clock_breakdown: bool = Field(default=False, description="Time forward, backward and step.")
    memory_breakdown: bool = Field(default=False, description="Print memory at each part of a step.")
    dump_state: bool = Field(
        default=False, description="Print every setting, and who made it, when the engine is made."
    )
    log_level: str | None = Field(default=None, description="Level of DeepSpeed's logger.")
    vocabulary_size: Positive | None = Field(
        default=None,
        description="Rows of the embedding; a warning when tensor cores would like another number.",
    )
    dataloader_drop_last: bool = Field(
        default=False, description="Leave out a last micro-batch that is smaller than the others."
    )
    disable_python_gc: bool = Field(default=False, description="Collect garbage between steps only.")
    sequence_parallel_size: Positive | None = Field(default=None, description="Ranks that share a sequence.")
    data_parallel_size: Positive | None = Field(
        default=None, description="Data-parallel ranks, beside sequence_parallel_size."
    )
    use_data_before_expert_parallelism: bool = Field(
        default=False, description="Neighbouring ranks hold the same experts, not different ones."
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="What is kept on disk."
    )
    activation_checkpointing: ActivationCheckpointingConfig = Field(
        default_factory=ActivationCheckpointingConfig, description="How activations rest until backward."
    )
    aio: AioConfig = Field(default_factory=AioConfig, description="Reading and writing on disks.")
    tensorboard: TensorBoardConfig = Field(default_factory=TensorBoardConfig, description="TensorBoard.")
    csv_monitor: CsvConfig = Field(default_factory=CsvConfig, description="CSV files.")
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases.")
    comet: CometConfig = Field(default_factory=CometConfig, description="Comet.")
    flops_profiler: FlopsProfilerConfig = Field(
        default_factory=FlopsProfilerConfig, description="FLOPs and time of modules."
    )
    comms_logger: CommsLoggerConfig = Field(
        default_factory=CommsLoggerConfig, description="Records of collectives."
    )
    timers: TimersConfig = Field(default_factory=TimersConfig, description="Timers.")
    data_efficiency: DataEfficiencyConfig = Field(
        default_factory=DataEfficiencyConfig, description="Choice of samples and tokens."
    )
    curriculum_learning: LegacyCurriculumConfig = Field(
        default_factory=LegacyCurriculumConfig, description="Short sequences first."
    )
    progressive_layer_drop: ProgressiveLayerDropConfig = Field(
        default_factory=ProgressiveLayerDropConfig, description="Layers that are skipped at random."
    )
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig, description="Pipeline parallelism.")
    tensor_parallel: TensorParallelConfig = Field(
        default_factory=TensorParallelConfig, description="Layers that are cut across ranks."
    )
    expert_parallel: ExpertParallelConfig = Field(
        default_factory=ExpertParallelConfig, description="Experts that are dealt out to ranks."
    )
    sparse_attention: SparseAttentionConfig | None = Field(default=None, description="Attention by blocks.")
    compile: CompileConfig = Field(default_factory=CompileConfig, description="DeepCompile.")
    autotuning: AutotuningConfig = Field(default_factory=AutotuningConfig, description="Search for settings.")
    elasticity: ElasticityConfig = Field(
        default_factory=ElasticityConfig, description="Batch sizes for many numbers of ranks."
    )
    hybrid_engine: HybridEngineConfig = Field(
        default_factory=HybridEngineConfig, description="Training and generation."
    )
    compression_training: CompressionConfig = Field(
        default_factory=CompressionConfig, description="Quantisation and pruning while training."
    )
    quantize_training: QuantizeTrainingConfig = Field(
        default_factory=QuantizeTrainingConfig, description="Mixture of quantisation."
    )
    eigenvalue: EigenvalueConfig = Field(default_factory=EigenvalueConfig, description="Curvature of layers.")
    weight_quantization: InferenceWeightsConfig | None = Field(
        default=None, description="Weights in few bits for inference."
    )
    nebula: NebulaConfig = Field(default_factory=NebulaConfig, description="Azure's checkpoint service.")
    datastates_ckpt: dict[str, Any] | None = Field(
        default=None, description="The DataStates checkpoint library."
    )
    graph_harvesting: bool = Field(default=False, description="Replay CUDA graphs in stage 3.")
    seed: Count | None = Field(
        default=None,
        description="Seeds the random generators of every rank (differently) and the order of training_data. "
        "Default: generators are left alone, and the order is that of seed 0.",
    )
    startup_summary: bool = Field(
        default=True, description="Print on rank 0 what was chosen, and why, and what each rank holds."
    )
    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """Where the values came from; what `load` has renamed, left to defaults, or ignored."""
        return self._origin

    def with_origin(self, origin: Origin) -> DsConfig:
        """The same values, with their origin; for `load`."""
        self._origin = origin
        return self

    def batch(self, world_size: int) -> Batch:
        """The three batch sizes for a number of ranks; ConfigError shows the equation where they contradict
        each other.
        """
        if self.data_parallel_size not in (None, world_size):
            raise ConfigError(
                [
                    f"data_parallel_size is {self.data_parallel_size}, and there are {world_size} ranks, all of them "
                    "data-parallel: remove it, or start as many ranks"
                ],
                self.origin.where,
            )
        return resolve(
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
            world_size,
        )
