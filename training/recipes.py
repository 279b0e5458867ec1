"""How each dataset is trained: by the configuration, by its task, and by settings of its own.

The settings are a file's (configuration/dataset_settings.py). Without one every recipe is that of its task:

    retrieval                       in-batch and hard-negative loss, num_hard_neg negatives
    clustering, classification      hard-negative loss, num_hard_neg_clustering negatives, and 1

Where a dataset has no negatives, or none are drawn, there is no hard-negative loss: it would be 0 for any model.
"""

from dataclasses import dataclass, fields, replace

from arguments import Args
from configuration.dataset_settings import LOSSES, DatasetSettings, Settings
from data.store_report import DATASETS_SHOWN, some
from data.token_store import TASKS, TokenStore
from modeling.prompts import bare_instruction
from utils import plural


@dataclass(frozen=True)
class Recipe:
    """How one dataset is trained."""

    name: str
    task: str
    losses: tuple[str, ...]  # those of in_batch and hard that apply; none at all is refused before a start
    negatives: int  # hard negatives drawn per tuple, no more than the dataset has
    temperature: float
    max_length: int  # tokens of a text, EOS included
    sampling_weight: float  # passes over the dataset in an epoch
    instruction: str | None  # that settings ask for; its queries were given it when they were tokenised
    changed: tuple[str, ...] = ()  # the fields that would be otherwise without settings

    @property
    def in_batch(self) -> bool:
        """Whether its queries are compared with the positives of the whole global batch."""
        return "in_batch" in self.losses

    def changes(self) -> dict:
        """Field -> value of what settings have changed."""
        return {name: getattr(self, name) for name in self.changed}

    def words(self) -> str:
        """What settings have changed, for people."""
        words = {
            "losses": f"losses {' and '.join(self.losses) or 'none'}",
            "negatives": plural(self.negatives, "hard negative"),
            "temperature": f"temperature {self.temperature!r}",
            "max_length": f"texts cut at {self.max_length:,} tokens",
            "sampling_weight": f"sampling weight {self.sampling_weight!r}",
            "instruction": f"instruction {self.instruction!r}",
        }
        return ", ".join(words[name] for name in self.changed)


def recipes_for(args: Args, stores: list[TokenStore], settings: DatasetSettings) -> list[Recipe]:
    """The recipe of each dataset, in their order."""
    recipes = []
    for store in stores:
        usual = _recipe(args, store, Settings())
        recipe = _recipe(args, store, settings.of(store.name))
        changed = [f.name for f in fields(Recipe) if getattr(recipe, f.name) != getattr(usual, f.name)]
        recipes.append(replace(recipe, changed=tuple(changed)))
    return recipes


def _recipe(args: Args, store: TokenStore, own: Settings) -> Recipe:
    """The recipe of a dataset with these settings of its own; `changed` is left empty."""
    losses = _own_or_usual(own.losses, LOSSES if store.task == "retrieval" else ("hard",))
    negatives = 0
    if "hard" in losses:
        asked = _own_or_usual(own.num_hard_neg, args.negatives_for(store.task))
        negatives = min(asked, store.meta["negatives"])
    instruction = own.instruction
    if instruction is not None:
        instruction = bare_instruction(instruction)
    return Recipe(
        name=store.name,
        task=store.task,
        losses=_that_apply(losses, negatives),
        negatives=negatives,
        temperature=float(_own_or_usual(own.temperature, args.temperature)),
        max_length=_own_or_usual(own.max_length, args.max_seq_length),
        sampling_weight=float(_own_or_usual(own.sampling_weight, 1.0)),
        instruction=instruction,
    )


def _own_or_usual(own, usual):
    """The value in a dataset's settings, or the usual one where they have none."""
    return usual if own is None else own


def _that_apply(losses: tuple[str, ...], negatives: int) -> tuple[str, ...]:
    """The losses in their order, without the hard-negative loss where no negatives are drawn."""
    applying = [loss for loss in LOSSES if loss in losses]
    if not negatives and "hard" in applying:
        applying.remove("hard")
    return tuple(applying)


def describe_recipes(recipes: list[Recipe]) -> list[str]:
    """What settings have changed, for people: a line for each dataset, of many for the first; none without settings."""
    changed = [recipe for recipe in recipes if recipe.changed]
    if not changed:
        return []
    shown = changed[:DATASETS_SHOWN]
    width = max(len(recipe.name) for recipe in shown)
    lines = [f"{plural(len(changed), 'dataset')} with settings of {'its' if len(changed) == 1 else 'their'} own:"]
    lines += [f"  {recipe.name:{width}}  {recipe.words()}" for recipe in shown]
    if len(changed) > len(shown):
        lines.append(f"  and {len(changed) - len(shown):,} more, in the run's manifest.json")
    return lines


def expected_losses(recipes: list[Recipe], distils: bool) -> list[tuple[str, str]]:
    """(task, loss) of everything that is trained: each has its column on the console.

    Args:
        distils: there is a teacher.
    """
    expected = []
    for task in TASKS:
        of_task = [recipe for recipe in recipes if recipe.task == task]
        for loss in LOSSES:
            if any(loss in recipe.losses for recipe in of_task):
                expected.append((task, loss))
        if of_task and distils:
            expected.append((task, "distillation"))
    return expected


# ------------------------------------------------------------------------------------- what is refused


def too_long(settings: DatasetSettings, max_seq_length: int) -> list[str]:
    """Settings that ask for longer texts than the configuration allows, one line each."""
    problems = []
    for name, entry in settings.entries.items():
        length = entry.get("max_length")
        if length is not None and length > max_seq_length:
            problems.append(
                f"{settings.path}: {name}: max_length: {length:,} is above the configuration's max_seq_length "
                f"{max_seq_length:,}, at which every text is cut: raise that, or leave this out"
            )
    return problems


def without_loss(stores: list[TokenStore], recipes: list[Recipe]) -> list[str]:
    """Datasets that no loss applies to, one line each: they would train nothing and look perfect."""
    problems = []
    for store, recipe in zip(stores, recipes, strict=True):
        if recipe.losses:
            continue
        reason = "there are none in it"
        if store.meta["negatives"]:
            reason = "num_hard_neg is 0"
        problems.append(
            f"{store.folder}: {store.task} has the hard-negative loss alone, and no negatives ({reason}): "
            "nothing would be learnt from it"
        )
    return problems


def not_as_tokenised(stores: list[TokenStore], recipes: list[Recipe], settings: DatasetSettings) -> list[str]:
    """Instructions that settings ask for and that queries were not given, a line for each instruction."""
    names: dict[tuple[str, str | None], list[str]] = {}
    for store, recipe in zip(stores, recipes, strict=True):
        given = store.meta["inputs"].get("instruction")
        if recipe.instruction is not None and recipe.instruction != given:
            names.setdefault((recipe.instruction, given), []).append(store.name)
    problems = []
    for (asked, given), datasets in names.items():
        was = "without an instruction" if given is None else f"with {given!r}"
        problems.append(
            f"{settings.path}: instruction: {asked!r}, but {some(datasets)} was tokenised {was}: tokenise again with "
            "this file (tokenize_data_qwen.py --overwrite true), or take the setting out"
        )
    return problems
