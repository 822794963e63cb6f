"""The whole configuration: `ds_config.json` as a typed value."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from ds_engine.config.elastic.section import batch_on
from ds_engine.config.sections.activation_checkpointing import ActivationCheckpointingConfig
from ds_engine.config.sections.activation_offload import ActivationOffloadConfig
from ds_engine.config.sections.aio import AioConfig
from ds_engine.config.sections.autotuning import AutotuningConfig
from ds_engine.config.sections.checkpoint import CheckpointConfig
from ds_engine.config.sections.communication.links import LinksConfig
from ds_engine.config.sections.communication.local_sgd import LocalSgdConfig
from ds_engine.config.sections.communication.stalls import StallReportsConfig
from ds_engine.config.sections.compile import CompileConfig
from ds_engine.config.sections.compress.compression import CompressionConfig
from ds_engine.config.sections.compress.weight_quantization import InferenceWeightsConfig
from ds_engine.config.sections.data.curriculum import LegacyCurriculumConfig
from ds_engine.config.sections.data.data_efficiency import DataEfficiencyConfig
from ds_engine.config.sections.elasticity import ElasticityConfig
from ds_engine.config.sections.hybrid_engine import HybridEngineConfig
from ds_engine.config.sections.integrity import IntegrityConfig
from ds_engine.config.sections.monitor import CometConfig, CsvConfig, TensorBoardConfig, WandbConfig
from ds_engine.config.sections.offload.budget import OffloadConfig
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
        description="Number of samples per optimizer step over all ranks: train_micro_batch_size_per_gpu x "
        "gradient_accumulation_steps x ranks. Default: computed from the other two sizes. Either "
        "this key or train_micro_batch_size_per_gpu is required.",
    )
    train_micro_batch_size_per_gpu: Positive | None = Field(
        default=None,
        description="Number of samples per forward pass on one rank. Default: computed from the other two "
        "sizes.",
    )
    gradient_accumulation_steps: Positive | None = Field(
        default=None,
        description="Number of micro-batches per optimizer step. Default: computed from the other two sizes, or "
        "1 if only one of them is set.",
    )
    managed_gradient_accumulation: bool = Field(
        default=True,
        description="Lets the engine count micro-batches: only every gradient_accumulation_steps-th step() "
        "updates the parameters. With false, every step() updates.",
    )
    optimizer: OptimizerConfig | None = Field(
        default=None, description="Optimizer that is built if none is passed to initialize(). Default: none."
    )
    scheduler: SchedulerConfig | None = Field(
        default=None,
        description="Learning-rate schedule that is built if none is passed to initialize(). Default: a "
        "constant learning rate.",
    )
    fp16: Fp16Config = Field(default_factory=Fp16Config, description="Mixed precision in float16.")
    bf16: Bf16Config = Field(default_factory=Bf16Config, description="Mixed precision in bfloat16.")
    torch_autocast: TorchAutocastConfig = Field(
        default_factory=TorchAutocastConfig, description="Mixed precision by torch.autocast."
    )
    data_types: DataTypesConfig = Field(
        default_factory=DataTypesConfig, description="Dtypes of gradient sums, parameters and buffers."
    )
    amp: AmpConfig = Field(default_factory=AmpConfig, description="Mixed precision by NVIDIA Apex.")
    zero_optimization: ZeroOptimizationConfig = Field(
        default_factory=ZeroOptimizationConfig, description="ZeRO: how training state is divided among ranks."
    )
    gradient_clipping: NotNegative = Field(
        default=1.0,
        description="Maximum global 2-norm of the gradient; a larger gradient is scaled down to it. 0 turns "
        "clipping off.",
    )
    prescale_gradients: bool = Field(
        default=False,
        description="Divides gradients by the number of ranks before they are summed over ranks, instead of "
        "after.",
    )
    gradient_predivide_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0,
        description="Divisor of gradients before the sum over ranks. After the sum they are divided by ranks / "
        "gradient_predivide_factor. It has no effect with prescale_gradients.",
    )
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], BeforeValidator(lowered)] = Field(
        default="mean", description="Whether gradients are averaged or summed over ranks."
    )
    communication_data_type: WireDtype | None = Field(
        default=None,
        description="Dtype in which gradients are sent. Default: the dtype in which they were computed.",
    )
    seq_parallel_communication_data_type: WireDtype = Field(
        default="fp32", description="Dtype of sums over sequence-parallel ranks."
    )
    links: LinksConfig | None = Field(
        default=None,
        description="Measured links between ranks, for a check of what compresses messages. Default: no check.",
    )
    local_sgd: LocalSgdConfig | None = Field(
        default=None,
        description="Ranks step alone, and average what they did now and then. Default: gradients are averaged in "
        "every step.",
    )
    sparse_gradients: bool = Field(
        default=False, description="Sends only the nonzero rows of embedding gradients, at stage 0."
    )
    disable_allgather: bool = Field(
        default=False, description="Distributes updated parameters by broadcasts instead of by all-gather."
    )
    zero_allow_untested_optimizer: Flag = Field(
        default=False, description="Accepts optimizers that DeepSpeed was not tested with."
    )
    zero_force_ds_cpu_optimizer: bool = Field(
        default=True,
        description="Refuses an optimizer object that is not from ds_offload if offload_optimizer is used.",
    )
    steps_per_print: Annotated[Count | None, BeforeValidator(_infinity_is_never)] = Field(
        default=None,
        description="Number of optimizer steps between two progress lines on rank 0; 0 prints none. Default: "
        "none are printed.",
    )
    wall_clock_breakdown: bool = Field(
        default=False, description="Measures the time of forward, backward and step."
    )
    memory_breakdown: bool = Field(
        default=False, description="Prints the memory in use after each part of a step."
    )
    dump_state: bool = Field(
        default=False, description="Prints every setting and its origin in initialize()."
    )
    log_level: str | None = Field(
        default=None, description="Level of DeepSpeed's logger. Default: the logger's own."
    )
    vocabulary_size: Positive | None = Field(
        default=None,
        description="Number of rows of the embedding. A warning is issued if it is not a multiple of 8. Default: "
        "not checked.",
    )
    dataloader_drop_last: bool = Field(
        default=False, description="Drops the last micro-batch of an epoch if it is smaller than the others."
    )
    disable_python_gc: bool = Field(
        default=False, description="Runs Python's garbage collector only between steps."
    )
    sequence_parallel_size: Positive | None = Field(
        default=None, description="Number of ranks among which a sequence is divided. Default: 1."
    )
    data_parallel_size: Positive | None = Field(
        default=None,
        description="Expected number of data-parallel ranks. Another number raises an error. Default: not checked.",
    )
    use_data_before_expert_parallelism: bool = Field(
        default=False, description="Gives consecutive ranks the same experts instead of different ones."
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig,
        description="How many checkpoints are kept, and how they are written.",
    )
    activation_checkpointing: ActivationCheckpointingConfig = Field(
        default_factory=ActivationCheckpointingConfig,
        description="Where the inputs of recomputed layers are stored until backward.",
    )
    offload: OffloadConfig = Field(
        default_factory=OffloadConfig,
        description="Placement of the training state within a budget of memory.",
    )
    activation_offload: ActivationOffloadConfig = Field(
        default_factory=ActivationOffloadConfig,
        description="Where activations are kept between forward and backward.",
    )
    aio: AioConfig = Field(default_factory=AioConfig, description="How files on a disk are read and written.")
    tensorboard: TensorBoardConfig = Field(
        default_factory=TensorBoardConfig, description="Curves for TensorBoard."
    )
    csv_monitor: CsvConfig = Field(default_factory=CsvConfig, description="Curves as CSV files.")
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Curves at Weights & Biases.")
    comet: CometConfig = Field(default_factory=CometConfig, description="Curves at Comet.")
    flops_profiler: FlopsProfilerConfig = Field(
        default_factory=FlopsProfilerConfig, description="FLOPs and time of modules."
    )
    comms_logger: CommsLoggerConfig = Field(
        default_factory=CommsLoggerConfig, description="Records of collectives."
    )
    stall_reports: StallReportsConfig = Field(
        default_factory=StallReportsConfig, description="Reports of ranks that others wait for."
    )
    timers: TimersConfig = Field(default_factory=TimersConfig, description="Timers of the engine.")
    data_efficiency: DataEfficiencyConfig = Field(
        default_factory=DataEfficiencyConfig, description="Choice of samples, batches and tokens."
    )
    curriculum_learning: LegacyCurriculumConfig = Field(
        default_factory=LegacyCurriculumConfig, description="A curriculum of sequence lengths."
    )
    progressive_layer_drop: ProgressiveLayerDropConfig = Field(
        default_factory=ProgressiveLayerDropConfig, description="Layers that are skipped at random."
    )
    pipeline: PipelineConfig = Field(default_factory=PipelineConfig, description="Pipeline parallelism.")
    tensor_parallel: TensorParallelConfig = Field(
        default_factory=TensorParallelConfig, description="Tensor parallelism."
    )
    expert_parallel: ExpertParallelConfig = Field(
        default_factory=ExpertParallelConfig, description="Expert parallelism."
    )
    sparse_attention: SparseAttentionConfig | None = Field(
        default=None, description="Block-sparse attention. Default: none."
    )
    compile: CompileConfig = Field(default_factory=CompileConfig, description="DeepCompile.")
    autotuning: AutotuningConfig = Field(
        default_factory=AutotuningConfig, description="A search for settings by short runs."
    )
    elasticity: ElasticityConfig = Field(
        default_factory=ElasticityConfig, description="Batch sizes for many numbers of ranks."
    )
    integrity: IntegrityConfig = Field(
        default_factory=IntegrityConfig, description="Checks that find corrupted values."
    )
    hybrid_engine: HybridEngineConfig = Field(
        default_factory=HybridEngineConfig, description="Training and generation with the same weights."
    )
    compression_training: CompressionConfig = Field(
        default_factory=CompressionConfig, description="Quantisation and pruning during training."
    )
    quantize_training: QuantizeTrainingConfig = Field(
        default_factory=QuantizeTrainingConfig, description="Mixture of quantisation (MoQ)."
    )
    eigenvalue: EigenvalueConfig = Field(
        default_factory=EigenvalueConfig, description="Eigenvalues of the Hessian of each layer."
    )
    weight_quantization: InferenceWeightsConfig | None = Field(
        default=None, description="Quantised weights for inference. Default: none."
    )
    nebula: NebulaConfig = Field(default_factory=NebulaConfig, description="Azure's checkpoint service.")
    datastates_ckpt: dict[str, Any] | None = Field(
        default=None, description="Settings of the DataStates checkpoint library. Default: none."
    )
    graph_harvesting: bool = Field(default=False, description="Replays CUDA graphs at stage 3.")
    seed: Count | None = Field(
        default=None,
        description="Seed of the random generators (seed + rank) and of the order of training_data (seed). "
        "Default: the generators are not seeded, and the order has seed 0.",
    )
    startup_summary: bool = Field(
        default=True,
        description="Prints the start-up table on rank 0 in initialize(): settings, their reasons, and the "
        "memory of a rank.",
    )
    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def moves_activations(self) -> bool:
        """Whether activations are moved, by `activation_offload.device` or by a budget."""
        budget = self.offload.budget
        return self.activation_offload.device != "none" or (
            budget is not None and budget.activations is not None
        )

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
        each other, or the compatible numbers of ranks where an elastic batch cannot be divided.
        """
        if self.data_parallel_size not in (None, world_size):
            raise ConfigError(
                [
                    f"data_parallel_size is {self.data_parallel_size}, and there are {world_size} data-parallel ranks: "
                    "remove it, or start as many ranks"
                ],
                self.origin.where,
            )
        if self.elasticity.enabled:
            return batch_on(self.elasticity, world_size)
        return resolve(
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
            world_size,
        )
