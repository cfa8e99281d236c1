"""Every constant of the method and of the engine, each with its reason. CLI flags mirror these fields."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    queue_depth: int = 8  # prefetches in flight: twice the readers keeps them busy between two layers
    read_retries: int = 2  # a read that fails is tried this often again before StorageError
    asynchronous: bool = True  # False: the synchronous twin, every transfer completes where it is issued


@dataclass(frozen=True)
class SensorConfig:
    """How routing is turned into the demand to expect. Values: by coverage, docs/log.md."""

    fast_tokens: float = 7.0  # mean life of the fast average: text keeps its subject for a clause ...
    slow_tokens: float = 100.0  # ... and its kind for much longer
    fast_share: float = 0.5  # weight of the fast average in their mix
    floor: float = 0.15  # share of the long-run rate in that mix: what is long unseen is not impossible
    table_bytes: int = 64 << 20  # token table: some 2,700 distinct tokens of a 48 x 128 model
    table_prior: float = 1.0  # sightings' worth of the long-run rate in each row: one sighting says much
    table_memory: float = 500.0  # sightings a row averages over; float16 could not take smaller steps
    recent_memory: float = 5.0  # sightings that the second average of a row, of the present text, spans
    recent_weight: float = 8.0  # what one of those counts for: this text's use of a token over all others
    rate_prior: float = 16.0  # tokens' worth of even routing in the long-run rate: it never is quite zero
    rate_tokens: float = 1e5  # mean life of the long-run rate: long enough to be the model's own habit
    acceptance_passes: float = 50.0  # mean life of the acceptance rate by position; it follows the text
    acceptance_prior: float = 0.8  # before anything was verified: what a fair drafter reaches
    plan_tokens: int = 64  # a longer window (prefill) is judged by its last tokens: it touches most experts


@dataclass(frozen=True)
class UtilityConfig:
    """Discrete utility levels: inertial transition and adaptive boundary calibration."""

    levels: int = 5  # U, from the paper's reference code
    up: float = 1.0  # rise when the calibrated level is this far above. The reference's 5 compares a raw
    down: float = 1.0  # count with a level, so few experts ever rise; ours compares like with like
    spread: float = 0.8  # logits between the shares of experts that neighbouring boundaries let through
    histogram_windows: float = 16.0  # mean life of the demand histogram: it follows K, acceptance and text
    level_weight: float = 0.01  # what a level adds to the expected count per token when experts are ordered
    prefetch_margin: float = 2.0  # times a victim's utility before it makes way: a quarter less to read
    pass_discount: float = 0.8  # worth of a need one full pass away: less certain, and time to refetch
    copy_worth: float = 0.25  # worth in host memory of what the accelerator has: a refetch saved, if it goes


@dataclass(frozen=True)
class BalanceConfig:
    """Slots over layers, and experts over devices."""

    exact_cells: int = 1_000_000  # layers x thresholds x slots solved exactly, in ~2 ms; beyond: greedy
    residency_windows: float = 4.0  # over which a transfer is spread: how long an expert stays, measured 3.7
    rebalance_windows: int = 8  # between choices of thresholds: levels are inert, and a choice costs ~1 ms
    exact_splits: int = 256  # assignments enumerated at dispatch; beyond: prefixes; it runs in every layer


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


@dataclass(frozen=True)
class PolicyConfig:
    """Every constant of the method."""

    sensors: SensorConfig = field(default_factory=SensorConfig)
    utility: UtilityConfig = field(default_factory=UtilityConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    cost: CostConfig = field(default_factory=CostConfig)


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
class PackConfig:
    """How files are written when a checkpoint is packed or inflated."""

    commit_bytes: int = 64 << 20  # records synced and journalled together: under 0.1 s of work lost by a kill
    copy_bytes: int = 16 << 20  # read and written at once; larger gains nothing on NVMe
    shard_bytes: int = 4 << 30  # of one safetensors file, what the Hub's own tools write (about 5 GB at most)


@dataclass(frozen=True)
class EngineConfig:
    """All of it: what ``moespac.load`` assembles from its arguments."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    method: PolicyConfig = field(default_factory=PolicyConfig)
    policy: str = "moe-spac"
    window: int = 4  # drafted tokens a pass (K); 0: no speculation
    prefill_chunk: int = (
        2048  # prompt tokens a pass: each pass reads nearly all experts, each token costs memory
    )
