"""What the cascade trains: a teacher, students of a quarter of its size, and three ways to cut it to the same size."""

from dataclasses import dataclass
from pathlib import Path

PRUNED, RANDOM = "pruned", "random"
SEVERAL_SEEDS = ("pruned, distilled", "pruned")  # students whose comparison is decided by more than one


@dataclass(frozen=True)
class Sizes:
    """Of a decoder. Heads, their size and the vocabulary are the teacher's."""

    layers: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True)
class Student:
    """A model that is trained after the teacher."""

    name: str
    sizes: Sizes
    origin: str = PRUNED  # from the teacher's units, or from random weights
    distillation: float = 0.0  # weight of the loss to the teacher's embeddings; 0 = no teacher

    def experiment(self, seed: int) -> str:
        """The name of its run."""
        return f"{self.name.replace(' ', '_').replace(',', '')}-{seed}"


@dataclass(frozen=True)
class Cascade:
    """Sizes and lengths of the whole: about 50 minutes on two cores of an AMD EPYC, 80 on one.

    The embeddings of SmolLM2's vocabulary of 49,152 are 28 of the teacher's 50 million parameters, and depth alone
    leaves all of them. So the three ways to prune are compared at four fifths of its size, which all of them reach.
    Hidden sizes are multiples of its 9 heads, which Transformers asks of a Llama decoder.
    """

    folder: Path = Path("v2_demo")
    teacher: Path | None = None  # a trained folder to use; None = trains one
    layers: int = 6  # of SmolLM2's 30 that the teacher has
    gguf: Path | None = None  # a decoder as GGUF in place of SmolLM2
    quarter: Sizes = Sizes(layers=4, hidden_size=198, intermediate_size=768)  # 12.8 of 49.5 million parameters
    shallow: Sizes = Sizes(layers=3, hidden_size=576, intermediate_size=1536)  # 38.9 million
    narrow: Sizes = Sizes(layers=6, hidden_size=477, intermediate_size=1280)  # 38.8 million
    both: Sizes = Sizes(layers=5, hidden_size=513, intermediate_size=1280)  # 39.0 million
    teacher_steps: int = 180
    student_steps: int = 200
    cut_steps: int = 60  # of the three cuts: how fast each recovers
    seeds: tuple[int, ...] = (0, 1, 2)  # of the students with and without a teacher
    rows: int = 12500  # training tuples for retrieval, about
    others: int = 300  # of each other task
    one_file_in: int = 1  # Python files that are read

    def students(self) -> list[Student]:
        """Of a quarter of the teacher's size, trained for equally many steps."""
        return [
            Student("pruned, distilled", self.quarter, distillation=1.0),
            Student("pruned, distilled by a tenth", self.quarter, distillation=0.1),
            Student("pruned", self.quarter),
            Student("random weights", self.quarter, origin=RANDOM),
        ]

    def cuts(self) -> list[Student]:
        """Three prunings of about the same size, trained for a few steps without a teacher."""
        return [
            Student("depth alone", self.shallow),
            Student("width alone", self.narrow),
            Student("depth and width", self.both),
        ]

    def seeds_of(self, student: Student) -> tuple[int, ...]:
        """The seeds that a student is trained with."""
        if student.name in SEVERAL_SEEDS:
            return self.seeds
        return self.seeds[:1]
