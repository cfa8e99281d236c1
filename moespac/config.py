"""Every constant of the method and of the engine, each with its reason. CLI flags mirror these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moespac.errors import ConfigError


@dataclass(frozen=True)
class MemoryConfig:
    """How bytes are held and moved."""

    host_memory: str = "auto"  # what experts may take of host memory: bytes, percent of all experts, or auto
    accelerator_memory: str = "none"  # the same for the accelerator
    auto_share: float = (
        0.7  # of what is free, in auto: the KV cache, activations and other programs need the rest
    )
    readers: int = 4  # storage reads at once: 4-8 reach the disk's bandwidth, more do not (docs/log.md)
    read_ahead: int = 2  # reads in flight before more are prefetched: the disk is busy, a miss waits for few
    stripe_bytes: int = (
        1 << 20
    )  # of a record, read at once: two already keep a disk of 2 GB/s busy, and what waits overtakes
    stripes_ahead: int = 2  # of speculative reads at once; a read that a layer waits for has all readers
    queue_depth: int = 8  # copies to the accelerator in flight: one copies, the others wait their turn
    read_retries: int = 2  # a read that fails is tried this often again before StorageError
    asynchronous: bool = True  # False: the synchronous twin, every transfer completes where it is issued


@dataclass(frozen=True)
class DeviceConfig:
    """How a CUDA card's memory is shared out, and how it is kept busy."""

    context: int = 8192  # tokens whose KV caches have room beside the experts; longer texts take slots back
    kv_growth: float = 1.5  # of its final size: a cache that doubles holds the old half while it is copied
    graph_pool: int = 256 << 20  # CUDA graphs' private pool: a window's activations, shared by all layers
    reserve: int = (
        1 << 30
    )  # a prefill chunk of 2048 tokens (0.3-0.6 GiB for models of 30B), cuBLAS, fragments
    copies_ahead: int = (
        2  # copies on the stream: one runs, one is behind it; more cannot be taken back or overtaken
    )
    arena_piece: int = 64 << 20  # given back at once: 1% of a small card's slots; 160 mappings for 10 GiB
    shrink_share: float = (
        0.05  # of the slots, when memory runs out; twice as many each time that is not enough
    )


@dataclass(frozen=True)
class CalibrationConfig:
    """How costs are measured when a model is loaded: as much as two seconds can tell."""

    tokens: tuple[int, ...] = (1, 4, 16)  # decoding, a draft of ordinary length, the longest; linear between
    records_bytes: int = 128 << 20  # read, copied and computed in turn: more than caches hold
    experts_most: int = 64  # of small records too: a hundred tiny ones say nothing more
    repeats: int = 3  # the least counts: others can only disturb
    seconds: float = 1.0  # after which no further repeat begins


@dataclass(frozen=True)
class GraphConfig:
    """The trunk on a GPU, as CUDA graphs. Not measured on one yet."""

    most_tokens: int = 17  # of a window: 16 drafted, the paper's most, and one; longer ones are prompts
    least_bucket: int = 256  # tokens that attention reads at least: fewer save nothing that can be measured
    windows_kept: int = 24  # recorded pairs of size and bucket; each is as many graphs as layers


@dataclass(frozen=True)
class GroupedConfig:
    """How a layer's experts are computed on an accelerator; by data sheets (docs/accelerator-kernels.md)."""

    window_tokens: int = 32  # a pass's, up to which dot products in float32 keep up with memory: any window
    torch_multiplications: float = (
        5e9  # an expert's in a pass, from which on torch's own matmul, twice as fast,
    )
    # makes up for the 80 us that its dozen launches take: 1,000 tokens of a 2048 x 768 expert
    job_bytes: int = 16 << 10  # staged for a launch, at first: four times what 128 experts' jobs take
    tolerance: float = (
        2e-2  # of the norm, when the kernels are tried against torch: in bfloat16 a prompt errs
    )
    # by some 5e-3, a wrong gate or layout by 1e-1


@dataclass(frozen=True)
class ContextConfig:
    """How the routing of all layers together corrects the expectation of each expert. Values: docs/log.md."""

    directions: int = 32  # that each view is projected on: 16 lose .002 of coverage, 64 gain .001
    block: int = 64  # windows learned at once: solving costs as much as some 30 corrections
    ridge: float = 10.0  # tokens' worth of "no correction": less misleads until some 1,000 tokens were seen
    floor: float = 0.006  # routings a token: below, an expert's noise no longer falls with its rate


@dataclass(frozen=True)
class SensorConfig:
    """How routing is turned into the demand to expect. Values: by coverage, docs/log.md."""

    fast_tokens: float = 7.0  # mean life of the fast average: text keeps its subject for a clause ...
    slow_tokens: float = 100.0  # ... and its kind for much longer
    fast_share: float = 0.5  # weight of the fast average in their mix
    passage_tokens: float = 40.0  # mean life of the average by which experts are kept over many passes ...
    lasting_passage: float = 0.5  # ... its weight there ...
    lasting_fast: float = 0.3  # ... and that of the fast one; the long-run rate has the rest
    last_tokens: float = 2.0  # mean life of a third average that only the context sees: the phrase
    floor: float = 0.35  # share of the long-run rate in that mix: what is long unseen is not impossible
    table_bytes: int = 64 << 20  # token table: some 2,700 distinct tokens of a 48 x 128 model
    table_prior: float = 1.0  # sightings' worth of the long-run rate in each row: one sighting says much
    table_memory: float = 500.0  # sightings a row averages over; float16 could not take smaller steps
    recent_memory: float = 5.0  # sightings that the second average of a row, of the present text, spans
    recent_weight: float = 8.0  # what one of those counts for: this text's use of a token over all others
    pair_bytes: int = (
        16 << 20
    )  # routing kept to look pairs up in: the latest 21,000 tokens of 48 layers, top 8
    pair_sightings: int = 4  # of a pair, the latest; more say nothing new
    pair_fade: float = 0.7  # weight of each beside the one after it
    pair_prior: float = 3.0  # sightings' worth of what the token table says
    rate_prior: float = 16.0  # tokens' worth of even routing in the long-run rate: it never is quite zero
    rate_tokens: float = 1e5  # mean life of the long-run rate: long enough to be the model's own habit
    acceptance_passes: float = 50.0  # mean life of the acceptance rate by position; it follows the text
    acceptance_prior: float = 0.8  # before anything was verified: what a fair drafter reaches
    plan_tokens: int = 64  # a longer window (prefill) is judged by its last tokens: it touches most experts
    context: ContextConfig = field(default_factory=ContextConfig)


@dataclass(frozen=True)
class UtilityConfig:
    """Discrete utility levels: inertial transition and adaptive boundary calibration."""

    levels: int = 5  # U, from the paper's reference code
    up: float = 1.0  # rise when the calibrated level is this far above. The reference's 5 compares a raw
    down: float = 1.0  # count with a level, so few experts ever rise; ours compares like with like
    spread: float = 0.8  # logits between the shares of experts that neighbouring boundaries let through
    histogram_windows: float = 16.0  # mean life of the demand histogram: it follows K, acceptance and text
    level_weight: float = 0.01  # what a level adds to the expected count per token when experts are ordered
    prefetch_margin: float = (
        8.0  # times a victim's utility before it makes way: a read slows the experts beside it
    )
    pass_discount: float = 0.8  # worth of a need one full pass away: less certain, and time to refetch
    copy_worth: float = 0.25  # worth in host memory of what the accelerator has: a refetch saved, if it goes


@dataclass(frozen=True)
class ForesightConfig:
    """Routers of layers to come, asked early (policy/foresight.py)."""

    layers: int = (
        3  # asked ahead: a read takes as long as a layer or two; four to six gain 1% more, simulated
    )
    least: float = (
        0.5  # chance of being needed from which on an expert is read early: .35 and .65 are as good
    )
    fade: float = 0.9  # of its urgency, for each layer that it is further away
    step: float = 0.05  # of learning, for each expert that was needed: some hundred layers teach it
    weights: tuple[float, float, float] = (
        1.2,
        1.8,
        2.1,
    )  # log odds to begin with, as the embedded model has them


@dataclass(frozen=True)
class BalanceConfig:
    """Slots over layers, and experts over devices."""

    exact_cells: int = 1_000_000  # layers x thresholds x slots solved exactly, in ~2 ms; beyond: greedy
    residency_windows: float = 4.0  # over which a transfer is spread: how long an expert stays, measured 3.7
    rebalance_windows: int = (
        32  # between choices of thresholds: levels are inert, and a choice costs 2 to 5 ms
    )
    horizon_passes: float = 7.0  # over which an expert on the accelerator is credited with what it saves
    idle_price: float = (
        0.3  # of a copy's price, while tokens are drafted and the host is idle: a swap is a risk
    )
    pass_tokens_memory: float = 16.0  # passes over which the tokens of a pass are averaged


@dataclass(frozen=True)
class CostConfig:
    """What things cost before anything was measured; the cost model soon knows better."""

    host_bandwidth: float = 12e9  # bytes/s one core reads weights at (11-15 GB/s on desktop cores)
    host_token_share: float = 0.5  # a further token costs this share of reading weights (bf16 .3, int4 .7)
    accelerator_bandwidth: float = 800e9  # bytes/s, a consumer GPU's memory
    accelerator_token_share: float = 0.01  # GPUs have arithmetic to spare at these sizes
    accelerator_launch: float = 30e-6  # seconds to launch one expert's kernels
    link_bandwidth: float = 20e9  # bytes/s, pinned copies over PCIe 4.0 x16 under load
    storage_bandwidth: float = 1.5e9  # bytes/s, NVMe random reads of whole records
    samples: int = 9  # the median of this many latest measurements: up to four outliers do nothing
    buckets: int = 12  # token counts 1, 2, 4 .. 2048 that expert times are kept for
    redraw: int = 256  # measurements, at most, before a curve follows: drawing it in Python takes 50 us


@dataclass(frozen=True)
class BaselineConfig:
    """What the systems we compare with leave to their users, or do not publish."""

    miss_on: Literal["accelerator", "host"] = "accelerator"  # lru, lfu, arc: as most offloading systems do
    prefetch_list: int = 16  # experts listed ahead, renewed every layer: twice the flights there can be
    streaming_slots: int = 8  # kept free of static experts where others pass through: one a flight
    copy_batch: int = 32  # llama.cpp: tokens from which on it copies weights to the device; from its source
    calibration_passes: int = 32  # fiddler, ktransformers: with a prompt, hundreds of tokens to judge by
    staged_experts: int = 2  # mixtral-offloading: guessed for the next layer, as published
    shallow_share: float = 0.5  # fate: of the slots, for whole shallow layers; not published
    sequences: int = 64  # moe-infinity: activation matrices kept; beyond some dozens of topics they repeat
    score_top: int = 12  # hybrimoe: experts of a layer whose demand counts (p); from its source
    score_new: float = 0.5  # hybrimoe: weight of the newest pass in the score (alpha); from its source
    clairvoyant_discount: float = (
        0.6  # belady: worth of a use a pass further ahead, before which slots change hands
    )
    draft_token_seconds: float = 5e-3  # sp-moe, specter: one drafted token on a desktop GPU, an estimate
    first_plan: float = 0.2  # specter: share of the draft after which its first plan is made; from its source


@dataclass(frozen=True)
class PolicyConfig:
    """Every constant of the method."""

    sensors: SensorConfig = field(default_factory=SensorConfig)
    utility: UtilityConfig = field(default_factory=UtilityConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    foresight: ForesightConfig = field(default_factory=ForesightConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)


@dataclass(frozen=True)
class SamplingConfig:
    """How a request's tokens are drawn; the filters are transformers' own, in its order."""

    temperature: float = 0.0  # 0: greedy, the argmax
    top_k: int = 0  # only the k likeliest tokens; 0: off
    top_p: float = 1.0  # only the likeliest tokens that together reach this probability; 1: off
    min_p: float = 0.0  # only tokens at least this share as likely as the likeliest; 0: off
    seed: int = 0  # every draw of a request comes from one generator with this seed

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that cannot be used."""
        # Beyond these bounds logits / temperature leaves float32; within them nobody can tell the difference.
        if not (_is_within(self.temperature, 0, 0) or _is_within(self.temperature, 1e-6, 1e6)):
            raise ConfigError(
                f"temperature {self.temperature!r} cannot be used: give 0 (greedy) or 1e-6 to 1e6"
            )
        if not (_is_within(self.top_k, 0, 2**31) and isinstance(self.top_k, int)):
            raise ConfigError(f"top_k {self.top_k!r} cannot be used: give a whole number, 0 for all tokens")
        if not _is_within(self.top_p, 0, 1):
            raise ConfigError(f"top_p {self.top_p!r} cannot be used: give 0 to 1, 1 for all tokens")
        if not _is_within(self.min_p, 0, 1):
            raise ConfigError(f"min_p {self.min_p!r} cannot be used: give 0 to 1, 0 for all tokens")
        if not (_is_within(self.seed, 0, 2**63 - 1) and isinstance(self.seed, int)):
            raise ConfigError(f"seed {self.seed!r} cannot be used: give a whole number from 0 to 2**63 - 1")


@dataclass(frozen=True)
class SpeculationConfig:
    """Where prompt lookup looks."""

    max_ngram: int = 4  # the longest tail looked up first: four equal tokens are seldom chance
    min_ngram: int = 2  # one equal token mostly is, and a wrong draft fetches experts for nothing

    def __post_init__(self) -> None:
        """Raises ConfigError for sizes that cannot be used."""
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ConfigError(
                f"n-grams from {self.min_ngram} to {self.max_ngram} tokens cannot be looked up:"
                " give 1 <= min_ngram <= max_ngram"
            )


def _is_within(value: object, low: float, high: float) -> bool:
    """Whether ``value`` is a real number in [low, high]; NaN, text and truth values are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class AnalysisConfig:
    """What `moespac trace show` looks at."""

    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # tokens a window: plain decoding to the longest drafts
    near: int = 8  # tokens within which reuse is "soon": the figure that others publish
    slot_shares: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75)  # of a layer's experts, in the LRU table


@dataclass(frozen=True)
class TimelineConfig:
    """How many spans a timeline keeps; a decoded token of a large model has some thousand."""

    in_a_file: int = 1_000_000  # the last ones: 100 to 200 MB, what the viewers still open
    live: int = 20_000  # for a page that shows the last passes


@dataclass(frozen=True)
class DoctorConfig:
    """From where on `moespac doctor` speaks up. Bytes, bytes/s."""

    slow_memory: float = 8e9  # half of what one thread of an ordinary desktop reads
    little_free: float = 0.2  # of all host memory
    much_swap: int = 1 << 30  # less is what systems swap out of idle programs
    slow_storage: float = 5e8  # below SATA disks' rate: hard disks, network file systems
    slow_link: float = 8e9  # PCIe 3.0 x16 reaches 12 GB/s
    page_lock_bytes: int = 4 << 30  # tried at most: beyond the usual small limits, and two seconds
    page_lock_slot: int = 16 << 20


@dataclass(frozen=True)
class PackConfig:
    """How files are written when a checkpoint is packed or inflated."""

    commit_bytes: int = 64 << 20  # records synced and journalled together: under 0.1 s of work lost by a kill
    copy_bytes: int = 16 << 20  # read and written at once; larger gains nothing on NVMe
    shard_bytes: int = 4 << 30  # of one safetensors file, what the Hub's own tools write (about 5 GB at most)


@dataclass(frozen=True)
class SyntheticConfig:
    """Made-up routing: standard deviations and lives of what a logit is made of, and the text.

    Fitted by random search to locality figures of Qwen3-30B-A3B (docs/hardware.md).
    """

    popularity: float = 0.8  # of an expert, in every text; less than the topic's: training evens it out
    token: float = 0.77  # what experts like about a token, in every text
    topic: float = 1.3  # of the text: the hit rate of a large cache and the overlap of windows follow it ...
    topic_tokens: float = 1000.0  # ... and its mean life
    phrase: float = 1.0  # of the phrase: what repeats at the very next token follows it ...
    phrase_tokens: float = 1.5  # ... and its mean life
    vocabulary: int = 4096  # distinct tokens: an hour of text uses few more
    zipf: float = 1.0  # exponent of the tokens' frequencies: that of natural language
    repeat: float = 0.1  # share of the tokens that were used shortly before
    repeat_span: int = 64  # how many tokens before, at most: a paragraph


@dataclass(frozen=True)
class MeasureConfig:
    """How ``moespac profile`` measures. Large enough to leave every cache, small enough for a minute."""

    memory_bytes: int = 512 << 20  # read for the memory's bandwidth; no cache is as large
    storage_bytes: int = 1 << 30  # of the temporary file: what a disk's own cache holds is a small part of it
    storage_seconds: float = 1.5  # of reading, for each size and depth: disks vary within one second
    block_bytes: tuple[int, ...] = (
        1 << 20,
        4 << 20,
        9 << 20,
    )  # int4 to 16-bit experts of fine-grained models
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)  # reads in flight
    depth_slack: float = 1.1  # the least depth that reads this near to the fastest is enough: disks are noisy
    expert_hidden: int = 2048  # Qwen3-30B-A3B's expert: 4.7 million weights, of the size that models have
    expert_width: int = 768
    expert_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # beyond, seconds grow in proportion
    experts_each: int = 4  # that a thread computes in a call: what a layer's top-8 leaves two threads
    records_bytes: int = 128 << 20  # of each format, taking turns: together more than any cache holds
    beside_seconds: float = 0.4  # of reading, with and without experts beside it ...
    beside_turns: int = 5  # ... so often
    repeats: int = 15  # of each timing; the lower quartile counts
    decode_tokens: int = 16  # generated by the embedded model, ``repeats`` times, for a layer's overhead ...
    overhead_width: int = 8  # ... its experts so many times as wide: a pass reads 10 MB of them
    busy_seconds: float = 0.3  # over which it is seen what other programs take of the processor
    busy_share: float = 0.2  # of it, from which on a measurement is too low to be kept

    @staticmethod
    def quick() -> MeasureConfig:
        """A few seconds, for a first look; figures vary by tens of percent."""
        return MeasureConfig(
            memory_bytes=128 << 20,
            storage_bytes=128 << 20,
            storage_seconds=0.2,
            block_bytes=(4 << 20,),
            depths=(1, 4, 8),
            expert_tokens=(1, 4, 16),
            records_bytes=32 << 20,
            beside_seconds=0.2,
            beside_turns=3,
            repeats=5,
            decode_tokens=12,
        )


@dataclass(frozen=True)
class KernelBenchConfig:
    """How ``moespac bench kernels`` measures."""

    tokens: tuple[int, ...] = (1, 4, 8, 16)  # plain decoding to the longest drafts
    rotate_bytes: int = 288 << 20  # of each contender's weights, taking turns: no cache holds a tenth of it
    rounds: int = 60  # each contender's turns: some seconds a format


@dataclass(frozen=True)
class DecodeBenchConfig:
    """How ``moespac bench decode`` runs: the same for every contender."""

    factor: int = 128  # the embedded experts so many times as wide: 4.7 million weights, as large models have
    tokens: int = 24  # decoded for each prompt: long enough for caches and governor, short enough for a tour
    warmup_tokens: int = 16  # of one prompt before the measured ones: caches fill, pages are mapped
    ready_tokens: int = 2  # generated before the memory limit is set: libraries and buffers are then in place
    rounds: int = 2  # in each round all contenders run once; more rounds, narrower medians
    warmup_seconds: float = 8.0  # at most
    decode_seconds: float = 15.0  # of one run; a slower contender's rate is that of the tokens it came to
    run_seconds: float = 120.0  # of one run with loading; then it is ended and reported as out of time
    baseline_window: int = 4  # K of baselines with speculation: fixed, the paper's
    governed_aim: float = 0.95  # of the best fixed K's speed, which is known only afterwards
    llama_draft_most: int = 16  # llama.cpp's own default (--draft-max) ...
    llama_draft_probability: float = 0.75  # ... and below this probability it ends a draft (--draft-p-min)
    lookup_ngram: int = 2  # llama-cpp-python's own defaults of prompt lookup ...
    lookup_tokens: int = 10
    margin_bytes: int = (
        96 << 20
    )  # free beside experts and process: the kernel's own, and what other programs touch
    loading_bytes: int = 4 << 30  # free while a contender loads: the limit is on decoding, not on loading
    ballast_chunk: int = 16 << 20  # locked or freed at once: as near as the limit comes to what was asked for
    ballast_tries: int = 8  # adjustments until the kernel's own figure agrees; it lags behind
    memory_bytes: int = 256 << 20  # read for the memory's bandwidth; no cache is as large
    storage_depth: int = 8  # reads in flight when the storage's bandwidth is measured
    storage_seconds: float = 1.0  # of reading; measured again in each round


@dataclass(frozen=True)
class DispatchConfig:
    """How a layer's experts are handed to the devices."""

    kept_tokens: int = 32  # windows of up to so many write to buffers that are kept: 2 MB of rows at 2048 x 8


@dataclass(frozen=True)
class HostPathConfig:
    """What ``moespac bench host-path`` is held against."""

    aim: float = 150.0  # microseconds a layer: 7 ms of a pass of 48 layers, so at most 140 passes a second


@dataclass(frozen=True)
class GpuBenchConfig:
    """How ``moespac bench gpu`` runs. The shape is Qwen3-30B-A3B's, the drafter's Qwen3-0.6B's, as published."""

    layers: int = 48
    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    width: int = 768  # of an expert
    heads: int = 32
    groups: int = 4  # key and value heads
    head_width: int = 128
    vocabulary: int = 151936
    draft_layers: int = 28
    draft_hidden: int = 1024
    draft_width: int = 3072
    draft_heads: int = 16
    draft_groups: int = 8
    dtype: str = "auto"  # what is computed in: bfloat16 on a GPU
    factor: int = 128  # the embedded pair's experts so many times as wide: as large as the shape's
    pair_format: str = "bf16"  # of the pair's experts
    window: int = 4  # K of baselines that speculate: the paper's
    prompt_tokens: int = 32  # of a replayed text: caches and counters have seen something
    texts: int = 2
    warmup_tokens: int = 12  # of another text before the measured ones
    warmup_seconds: float = 2.0  # at most
    decode_seconds: float = 4.0  # of one run; a slower contender's rate is that of the tokens it came to
    watched_tokens: int = 8  # decoded with the timeline on, and under the profiler, after what is timed
    filling_reads: int = 16  # records copied into host memory at once before anything is timed
    resident_layers: int = 8  # of the shape, where every expert is on the card: compiling 48 takes minutes
    resident_tokens: int = 128  # decoded there: no expert moves, so a token takes milliseconds
    check_tokens: int = 48  # of the comparison with transformers, after one prompt
    logits_tolerance: float = 2.0  # in bfloat16, times what its rounding does to transformers' own logits
    host_share: float = (
        0.75  # of free host memory that the shape's experts may take; peers and pages need the rest
    )
    device_reserve: int = (
        12 << 30
    )  # of the card, beside experts: trunk, drafter, KV cache, buffers, CUDA itself
    patience: float = 90.0  # seconds that a worker may run over its time before it is ended
    restarts: int = 3  # of a worker whose run failed; the runs after it go on in a fresh one

    @staticmethod
    def quick() -> GpuBenchConfig:
        """The same in small: it shows that all of it runs, in seconds on a CPU; its figures say nothing."""
        return GpuBenchConfig(
            layers=4,
            experts=16,
            top_k=4,
            hidden=64,
            width=64,
            heads=4,
            groups=2,
            head_width=16,
            vocabulary=4096,
            draft_layers=2,
            draft_hidden=64,
            draft_width=128,
            draft_heads=4,
            draft_groups=2,
            factor=1,
            prompt_tokens=8,
            texts=1,
            warmup_tokens=4,
            decode_seconds=1.0,
            watched_tokens=4,
            resident_layers=2,
            resident_tokens=16,
            check_tokens=8,
        )


@dataclass(frozen=True)
class SimulationConfig:
    """What a simulation assumes where neither the trace nor the hardware profile says it."""

    prompt_tokens: int = (
        32  # that a text without a recorded prompt lends: caches and counters have seen something
    )
    next_gate_accuracy: float = 0.97  # of a layer's gate on the hidden states before it; Fate (2025)
    draft_routing_accuracy: float = (
        0.9  # of what a drafter's states say of the target; not published, between
    )
    # the share of experts that repeat at the next token and the next gate's
    host_share: float = 0.9  # of host memory for experts: the system and the program need the rest


@dataclass(frozen=True)
class EagerConfig:
    """A runtime that issues every operation from Python, as eager PyTorch does; HybriMoE's source, counted."""

    call_seconds: float = (
        6e-6  # of one call: Python, dispatch and launch take 5 to 25 us, here near the least
    )
    expert_calls: int = (
        27  # of an expert on the accelerator: where, index, three linears of six, activation, sum
    )
    layer_calls: int = 60  # of a layer's attention, norms, router, and of sorting its experts out


@dataclass(frozen=True)
class PlanConfig:
    """What ``moespac plan`` assumes."""

    layers: int = 6  # simulated, in place of all: they are alike, and a plan is to take seconds
    tokens: int = 64  # decoded in each simulation, after a prompt that warms the sensors
    local: SyntheticConfig = field(  # a text that keeps to its subject, and a router that follows it
        default_factory=lambda: SyntheticConfig(topic=1.8, phrase=1.2)
    )
    scattered: SyntheticConfig = field(  # a router trained to be even, and a text of many subjects
        default_factory=lambda: SyntheticConfig(popularity=0.4, topic=0.6, topic_tokens=200.0)
    )
    error: float = 0.25  # of the simulator on a machine that was measured, added on both sides (docs/plan.md)
    enough: float = 0.8  # a more exact format is recommended if it is this near to the fastest
    host_free: float = 0.9  # assumed of a host's memory: the system and other programs have the rest
    accelerator_free: float = 0.9  # of a card's that is not here: the driver, a CUDA context and a desktop
    # have 0.5 to 1 GB of it
    reserve_bytes: int = 1 << 30  # of host memory, beside KV caches: activations, buffers
    drafter_share: float = (
        0.1  # bytes of a draft model beside its target's trunk: 0.6B drafters of 30B targets
    )
    drafter_window: int = 4
    drafter_acceptance: float = 0.7  # of a draft model of the target's family, on prose and code
    acceptances: tuple[float, ...] = (0.5, 0.7, 0.9)  # that a named draft model is predicted for


@dataclass(frozen=True)
class ServeConfig:
    """How requests share the engine, and what a client may send."""

    queue: int = 32  # requests that wait; one more is told when to come again
    parallel: int = 4  # answers that take turns: each holds a KV cache, and the others' experts go cold
    turn_windows: int = (
        4  # windows a turn: as long as an expert stays resident (BalanceConfig), so that a turn
    )
    # finds again what it fetched; a drafter's and a reader's patience allow more
    max_tokens_limit: int = 0  # of one answer; 0: as many as the context holds
    body_bytes: int = 2 << 20  # of one request: half a million tokens of text
    header_bytes: int = 16 << 10  # of one request; what most servers allow
    connections: int = 256  # open at once
    grace_seconds: float = 10.0  # that running answers have to finish once the server is told to stop
    live_seconds: float = 0.15  # between two looks at the engine, however many look
    live_wait: float = 1.0  # for a look; a longer pass shows what was seen last
    live_watched: float = 5.0  # seconds after the last look in which the timeline goes on being recorded
    live_steps: int = 32  # that the rates on the page are taken over: some seconds
    live_passes: int = 4  # that the page's timeline shows
    live_spans: int = 2000  # of the timeline, at most: four passes of the embedded model have some 500
    speed_life: float = 8.0  # mean life, in answers, of what one answer costs: for Retry-After


@dataclass(frozen=True)
class GovernorConfig:
    """How the number of drafted tokens is chosen."""

    most: int = 8  # K is at most this: acceptance beyond is rare, and every token touches new experts
    acceptance_prior: float = 0.7  # before anything was verified: worth a try ...
    acceptance_drafts: float = 6.0  # ... drafts' worth of that, and of what is usual in each new text ...
    alike_drafts: float = (
        24.0  # ... up to this where texts were seen to be alike: the next may be another kind
    )
    judged_least: int = 4  # drafts of a text that say something of it
    spread_prior: float = 1.0  # texts' worth of what is believed of their differences before any was seen
    spread_texts: float = 8.0  # mean life of that
    usual_drafts: float = 128.0  # mean life of what is usual: a few texts
    look_back_passes: int = 8  # without drafts, then the drafter looks back: a change of text is found ...
    look_back_share: float = 0.01  # ... but for at most this share of the time: each costs a drafted token
    look_back_tokens: int = 16  # on so many at most: what came before says little
    mean_passes: float = (
        16.0  # mean life of the measurements: a change of text shows within some twenty passes
    )
    first_passes: int = 6  # in which few, no and many drafts are measured once
    probe_passes: int = (
        8  # then a neighbour of the best is tried after this many passes, ever more rarely ...
    )
    probe_passes_most: int = 64  # ... down to this: probes of a hopeless K then cost some 1%
    margin: float = 0.02  # by which drafting must be faster than not to draft
    close: float = 0.1  # K whose rates differ by less are compared as often as ever: neither costs much
    doubt: float = 0.5  # standard errors by which it must be faster beyond that: few measurements say little
    noise_prior: float = (
        0.1  # standard deviation of one measurement, as a share of a pass, before it is known
    )
    prior_passes: float = 8.0  # measurements' worth of what was foreseen by looking back
    token_share: float = (
        0.5  # of a token's share of a pass, what one more costs where no size near was measured
    )


@dataclass(frozen=True)
class EngineConfig:
    """All of it: what ``moespac.load`` assembles from its arguments."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    graphs: GraphConfig = field(default_factory=GraphConfig)
    method: PolicyConfig = field(default_factory=PolicyConfig)
    policy: str = "moe-spac"
    window: int | Literal["auto"] = (
        "auto"  # drafted tokens a pass (K); 0: no speculation; auto: as many as pay
    )
    governor: GovernorConfig = field(default_factory=GovernorConfig)  # chooses K in auto
    prefill_chunk: int = (
        2048  # prompt tokens a pass: each pass reads nearly all experts, each token costs memory
    )
