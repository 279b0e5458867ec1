"""How long a step takes, by a model of it: what computing, launching and communicating cost. For comparing ways.

Assumptions, each of which a measurement may correct:

- A decoder reaches half of a GPU's datasheet in bf16. A token costs two operations a weight of the layers, and its
  attention; the backward pass twice as much, half of it where almost all weights are frozen.
- A kernel takes KERNEL seconds beside its work, to be launched and to begin, and a layer has KERNELS of them. 28 layers
  take 8 ms a forward pass so, as much as 4,700 tokens of a 0.6B on an H100.
- The last tiles of a matrix product leave half of the GPU idle: 132 processors x tiles of 128 x 256 / 2 are 2.2 million
  results. By the shapes of Qwen3's layers that is as much as FILL / width more tokens: 1,400 of a 0.6B, 570 of a 4B.
  Together these make three quarters of a pass over 2,000 tokens of a 0.6B on an H100, and a quarter of one over 16,000.
- Communication runs beside computing, and a pass takes as long as the longer of the two, and SLOWED of the shorter:
  collectives take processors and memory from what they run beside.
- Whatever all ways have in common (losses, the update, a teacher) is left out.

The absolute times are rough; only their relations choose anything (training/policy.py).

    python -m pytest tests/training/test_step_time.py
"""

from dataclasses import dataclass

from training.memory import Layout, Weights

KERNEL = 5e-6  # seconds that a kernel takes beside its work
KERNELS = 60  # of a decoder layer's forward pass, run by torch one by one
FILL = 1.4e6  # tokens x width that a forward pass leaves idle
SLOWED = 0.1  # of what runs beside something longer, how much is not hidden
GATHERED = 2  # bytes of a weight while it is gathered: bf16
SUMMED = 4  # bytes of a gradient while it is summed over processes: fp32


@dataclass(frozen=True)
class Device:
    """What a kind of GPU can do."""

    flops: float  # operations a second of the datasheet, dense bf16
    link: float  # bytes a second from and to the other GPUs of its machine

    @property
    def reached(self) -> float:
        """Operations a second that a decoder reaches."""
        return 0.5 * self.flops


DEVICES = {  # part of the name that CUDA gives -> figures of the datasheets; links as collectives reach them
    "H200": Device(989e12, 300e9),
    "H100": Device(989e12, 300e9),
    "A100": Device(312e12, 200e9),
    "L40": Device(362e12, 20e9),
    "A10": Device(125e12, 20e9),
    "L4": Device(121e12, 20e9),
    "4090": Device(165e12, 20e9),
    "3090": Device(71e12, 20e9),
}
OTHER_GPU = DEVICES["A100"]
CPU = Device(1e12, 5e9)


def device_of(name: str) -> Device:
    """The figures of a device by its name, "NVIDIA H100 80GB HBM3"; "cpu" for none.

    >>> device_of("NVIDIA A100-SXM4-40GB") == DEVICES["A100"]
    True
    """
    if name == "cpu":
        return CPU
    for part, device in DEVICES.items():
        if part in name:
            return device
    return OTHER_GPU


@dataclass(frozen=True)
class Work:
    """What computing a step costs, whatever way it is run."""

    forward_flops: float  # of a token
    layers: int
    frozen: bool  # almost all weights: their gradients are not computed
    idle_tokens: float = 0.0  # that a pass could compute as well, for half of the GPU waits for the other half

    @property
    def backward_share(self) -> float:
        """The backward pass, in forward passes."""
        return 1.0 if self.frozen else 2.0


def work_of(weights: Weights, layers: int, width: int, attention_width: int, text_length: float) -> Work:
    """The work of a model.

    Args:
        width: d, of the states between layers.
        attention_width: heads x their width.
        text_length: tokens of a usual text, each of which attends to half of them.
    """
    attention = 2 * 2 * attention_width * layers * text_length / 2
    frozen = weights.trained_share < 0.5
    return Work(2 * weights.in_layers + attention, layers, frozen, idle_tokens=FILL / width)


@dataclass(frozen=True)
class Way:
    """One way to run a step."""

    parts: int
    recomputed_share: float  # of the layers
    keep_gathered: bool = False  # a sharded model stays whole from its first forward pass to its last backward pass


def step_seconds(tokens: int, way: Way, work: Work, weights: Weights, layout: Layout, device: Device) -> float:
    """Seconds of a step of `tokens` tokens on each process.

    A step in parts runs forward without gradients over all of them, then forward and backward over each. A sharded
    model is gathered before each of these passes, and sums its gradients at each part; copies sum theirs once.
    """
    of_part = tokens / way.parts
    gathering = GATHERED * weights.whole * _share_of_others(layout.shards) / device.link
    if not layout.sharded:
        gathering = 0.0
    first_gathering = gathering
    if way.keep_gathered:
        gathering = 0.0
    forward = _computing(of_part, 1.0, work, device)
    backward = _computing(of_part, work.backward_share + way.recomputed_share, work, device)
    forward_passes = way.parts if way.parts == 1 else 2 * way.parts
    seconds = _together(forward, first_gathering) + (forward_passes - 1) * _together(forward, gathering)
    last_summing = _summing(weights, layout, device)
    summing = last_summing if layout.sharded else 0.0
    seconds += (way.parts - 1) * _together(backward, gathering + summing)
    return seconds + _together(backward, gathering + last_summing)


def _together(computing: float, communicating: float) -> float:
    """Seconds of what runs at the same time."""
    return max(computing, communicating) + SLOWED * min(computing, communicating)


def _computing(tokens: float, forward_passes: float, work: Work, device: Device) -> float:
    """Seconds to compute so many forward passes, or what costs as much."""
    products = (tokens + work.idle_tokens) * work.forward_flops / device.reached
    launches = work.layers * KERNELS * KERNEL
    return forward_passes * (products + launches)


def _summing(weights: Weights, layout: Layout, device: Device) -> float:
    """Seconds to sum the gradients over all processes: within each set of shards, then between the copies."""
    within = SUMMED * weights.trained * _share_of_others(layout.shards)
    copies = layout.processes // layout.shards
    between = 2 * SUMMED * weights.trained / layout.shards * _share_of_others(copies)
    return (within + between) / device.link


def _share_of_others(processes: int) -> float:
    """Of what `processes` have together, how much each gets from the others."""
    return (processes - 1) / processes
