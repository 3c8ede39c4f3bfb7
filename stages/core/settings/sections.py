"""What the values of params.yaml may be."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from stages.core.runtime.cache import Storage

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MOST = 2**31 - 1  # of every whole number: what torch and its kernels can index
Whole = Annotated[int, Field(ge=0, le=MOST)]
Ridge = Annotated[
    float, Field(ge=0, le=1e9)
]  # relative to what it is added to: more is nothing but the ridge
Shift = Annotated[int, Field(ge=0, le=2**15)]  # pixels
Count = Annotated[int, Field(ge=1, le=MOST)]
Precision = Literal["float32", "float16", "bfloat16"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Section(BaseModel):
    """A mapping of params.yaml: unknown keys and values of another type are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StatisticsSection(Section):
    images: Count  # per task
    batch_size: Count = 100
    precision: Precision = "float32"  # of the values that are kept
    storage: Storage = "auto"
    positions: Annotated[float, Field(gt=0, le=1)] = 1.0
    memory: Positive | None = None  # GiB; null: what the machine has free
