"""The settings of every stage and method. Imports no torch, so recipes check fast."""

from __future__ import annotations

from typing import Annotated, Literal

from compresso.config import checked, limit, settings

TASK = "task_"  # begins the key of what a task measures
Dataset = Annotated[
    str,
    limit(
        description="Text to read: `stdlib`, `wikitext2`, `c4`, a local .txt, .jsonl or .parquet"
        " file or directory, a .npy of token ids, a hub dataset, or `self`: what the original"
        " writes. `auto`: `stdlib` for the bundled model, else `wikitext2`."
    ),
]
DEFAULT_SAMPLES = 128
Samples = Annotated[
    int | None,
    limit(
        ge=1,
        description=f"Sequences to read; if not given, {DEFAULT_SAMPLES}, and for `heal` as many as"
        " its steps use, where the text has them.",
    ),
]
Length = Annotated[
    int | None,
    limit(ge=8, description="Tokens per sequence; the smaller of 2048 and the model's limit."),
]
Seed = Annotated[int, limit(ge=0, description="Seed of every random choice.")]


@settings
class CalibrationSettings:
    """Where the calibration tokens come from."""

    dataset: Dataset = "auto"
    samples: Samples = None
    length: Length = None
    seed: Seed = 0
    batch_size: Annotated[
        int | None, limit(ge=1, description="Sequences run at once; about 2048 tokens' worth.")
    ] = None
    sampling_temperature: Annotated[
        float,
        limit(gt=0, le=10, description="For `self`: what the scores of a token are divided by."),
    ] = 1.0
    top_p: Annotated[
        float,
        limit(
            gt=0, le=1, description="For `self`: draw from the tokens that together have so much."
        ),
    ] = 1.0

    @property
    def wanted(self) -> int:
        """How many sequences to read, where nothing else decides that."""
        return self.samples or DEFAULT_SAMPLES

    @checked
    def _only_for_self(self) -> CalibrationSettings:
        if self.dataset != "self" and (self.sampling_temperature, self.top_p) != (1.0, 1.0):
            raise ValueError("`sampling_temperature` and `top_p` need `dataset` `self`")
        return self


@settings
class RuntimeSettings:
    """Where and how to compute. Changes the speed, and results only through rounding."""

    device: Annotated[str, limit(description="`auto`, `cpu`, `cuda` or `cuda:N`.")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        limit(description="Type blocks are run in; `auto` is the fastest that is safe here."),
    ] = "auto"
    max_memory: Annotated[
        str,
        limit(
            description="Most memory for hidden states, such as `2GB`; more goes to disk. A result"
            " that is larger is proved block by block."
        ),
    ] = "4GB"
    trust_remote_code: Annotated[
        bool, limit(description="Run model code that comes with the checkpoint.")
    ] = False
    verify: Annotated[
        bool,
        limit(
            description="Load every result as its users do, before it is published, and compare"
            " what it says with the model in memory."
        ),
    ] = True


@settings
class AnalyzeSettings:
    """Measuring how much every block, and each half of it, changes the residual stream."""

    tokens: Annotated[
        Literal["all", "last"],
        limit(description="Tokens the angular distance is averaged over; the paper uses `last`."),
    ] = "all"
    damage: Annotated[
        bool,
        limit(
            description="Also run the model without each attention, each MLP and each block:"
            " perplexity and KL."
        ),
    ] = False
    pairs: Annotated[
        bool,
        limit(description="Also compare every two blocks, for folding: what they add, weights."),
    ] = False
    advise: Annotated[
        bool, limit(description="Say what every method would remove for 5 to 50 % of parameters.")
    ] = False
    score_tokens: Annotated[
        int, limit(ge=1, description="Calibration tokens for `damage` and `pairs`.")
    ] = 16384
    sensitivity: Annotated[
        bool,
        limit(
            description="Also measure what each input group's errors cost: noise, and 2 to 8 bits."
            " `quantize --target-bits` reads it."
        ),
    ] = False
    quantizer: Annotated[
        Literal["gptq", "rtn"], limit(description="What quantizes the groups for `sensitivity`.")
    ] = "gptq"
    group_size: Annotated[
        int, limit(ge=-1, description="Columns sharing a scale, for `sensitivity`.")
    ] = 64
    sensitivity_tokens: Annotated[
        int, limit(ge=1, description="Calibration tokens for `sensitivity`.")
    ] = 4096
    plot: Annotated[
        bool | None,
        limit(description="Draw the report as .png and .svg; done if matplotlib is installed."),
    ] = None


@settings
class EvalSettings:
    """Measuring perplexity, distance from the original, speed and size."""

    dataset: Dataset = "auto"
    samples: Annotated[
        int | None, limit(ge=1, description="Windows to read; all of the text if not given.")
    ] = None
    length: Length = None
    seed: Seed = 0
    against: Annotated[
        str | None,
        limit(description="The original to compare with; else the recorded ancestor."),
    ] = None
    each: Annotated[
        bool, limit(description="Also evaluate every checkpoint between the original and this.")
    ] = False
    speed: Annotated[bool, limit(description="Measure tokens per second and memory.")] = True
    tasks: Annotated[
        tuple[str, ...],
        limit(
            description="Tasks of lm-eval to run besides: `stdlib_cloze` and `stdlib_choice`, which"
            " need no download, any that it knows, or YAML files of your own."
        ),
    ] = ()
    task_limit: Annotated[
        int | None, limit(ge=1, description="Most questions of each task; all if not given.")
    ] = None
    num_fewshot: Annotated[
        int | None, limit(ge=0, description="Examples before each question; as the task says.")
    ] = None
    prompt: Annotated[
        str | None, limit(description="Text to continue as a sample; else some of the dataset's.")
    ] = None

    @checked
    def _only_for_tasks(self) -> EvalSettings:
        if not self.tasks and (self.task_limit, self.num_fewshot) != (None, None):
            raise ValueError("`task_limit` and `num_fewshot` need `tasks`")
        return self
