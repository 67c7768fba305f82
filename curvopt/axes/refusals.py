"""What is said where samples cannot be found, or mix."""

from __future__ import annotations

from collections.abc import Sequence

from curvopt.axes.linking import Conflict
from curvopt.axes.ops import Ref
from curvopt.axes.owners import Meeting
from curvopt.axes.readings import Reading
from curvopt.errors import Coupled, CurvoptError, NoSamples

_WAY_OUT = (
    "Per-sample quantities exist only where every row of the loss depends on one sample: use "
    "normalization that does not look at the batch (GroupNorm, LayerNorm, BatchNorm in evaluation "
    "mode), and keep statistics over the batch out of the forward pass"
)


def _shape(shape: Sequence[int]) -> str:
    return str(list(shape))


def not_separate(
    meeting: Meeting | None, n: int | None, ref: Ref | None = None, single: bool = False
) -> CurvoptError:
    """Rows of the loss depend on several samples.

    Args:
        meeting: the op in which they met.
        n: their number, if it is known.
        ref: the data, which may be a constant where the number is known.
        single: it may be one sample.
    """
    where = (
        "" if meeting is None else f": they meet in {meeting}, which gives {_shape(meeting.output)}"
    )
    if meeting is not None and not meeting.known:
        where += ", an op of which it is not known that it keeps them apart"
    data = "" if ref is None else f" of the data of shape {_shape(ref.shape)}"
    count = "" if n is None else f" ({n} of them)"
    if meeting is not None and not meeting.output:
        return Coupled(
            f"samples are not separate{where}, a number that does not enter the loss linearly: the "
            "loss is no weighted sum or mean of the samples' own losses (a root, a power, a "
            "largest one, a product of losses?), so it has no part that belongs to one sample. Ask "
            f"for the gradient alone, or change the loss. {_WAY_OUT}"
        )
    alone = ". If it is one sample, pass batch_size=1" if single else ""
    if n is not None and ref is not None:
        alone = ". If that data is a constant (positions, say), register it as a buffer"
    return Coupled(
        f"samples are not separate{where}. Rows of the loss depend on several samples{data}{count}"
        f". {_WAY_OUT}{alone}"
    )


def outsider(meeting: Meeting, n: int) -> CurvoptError:
    """Data without samples of its own has the samples' length where it meets them."""
    if meeting.name in ("index", "_unsafe_index"):
        return CurvoptError(
            f"samples are not separate: {meeting} picks rows of {n} samples by a mask of shape "
            f"{_shape(meeting.output)} whose entries belong to no sample. Multiply by the mask "
            "instead of indexing: take the loss with reduction='none', times the mask"
        )
    return CurvoptError(
        f"samples are not separate: in {meeting}, data from outside of shape "
        f"{_shape(meeting.output)} meets {n} samples along their axis, but its rows do not belong "
        "to one sample each (they were mixed before, or serve several). If it is a constant of "
        f"the model, register it as a buffer. {_WAY_OUT}"
    )


def rows_shared(reading: Reading, n: int) -> CurvoptError:
    """One row of what looks like data serves several samples."""
    return CurvoptError(
        f"samples are not separate: one row of the data of shape {_shape(reading.entry.ref.shape)} "
        f"(dim {reading.dim}) is met by several of {n} samples. If it is a constant of the model, "
        f"register it as a buffer. {_WAY_OUT}"
    )


def kept_as_constant(error: CurvoptError, refs: Sequence[Ref]) -> CurvoptError:
    """The same error, of samples some of whose data was taken for constants at first."""
    shapes = ", ".join(_shape(ref.shape) for ref in refs)
    return type(error)(
        f"{error}. Data of shape {shapes}, in a buffer or a parameter without gradients, has a row "
        "for every sample where it meets them, so that it is theirs. If it never changes, what is "
        "made of all of its rows (a mean, a normalization) can be computed once and registered"
    )


def conflict(error: Conflict) -> CurvoptError:
    """Two readings do not fit together."""
    other = error.others[0]
    return CurvoptError(
        f"samples are not separate, or ambiguous: by {other}, a row of the loss belongs to other "
        f"samples than by {error.reading}. Shapes {_shape(other.entry.ref.shape)} and "
        f"{_shape(error.reading.entry.ref.shape)} may have been broadcast against each other "
        "(predictions [N, 1] and targets [N] give [N, N]). If one of them is a constant of the "
        "model, register it as a buffer; or pass batch_size= to say how many samples there are"
    )


def ambiguous(one: str, other: str, sizes: Sequence[int]) -> CurvoptError:
    """Two readings are possible."""
    numbers = " or ".join(f"batch_size={n}" for n in dict.fromkeys(sizes))
    return CurvoptError(
        f"the number of samples is ambiguous: {one}, or {other}. Pass {numbers} to say which"
    )


def contradicts(batch_size: int, n: int, found: Sequence[Reading]) -> CurvoptError:
    """`batch_size` is not what the data flow shows."""
    along = ", ".join(f"{r} ({r.size})" for r in found)
    return CurvoptError(
        f"batch_size={batch_size} contradicts the data flow: the rows of the loss belong to {n} "
        f"samples, found along {along}. Leave batch_size out, or pass {n}. If several rows belong "
        "to one sample, make them of it inside the recorded pass (x.repeat, torch.cat of views)"
    )


def no_data() -> NoSamples:
    """Nothing that could hold samples reaches the loss."""
    return NoSamples(
        "no samples found: the loss depends on parameters and buffers only. Record the forward "
        "pass and the loss together, and pass the data as tensors that are no parameters or "
        "buffers; a loss computed outside the recorded pass cannot be used"
    )


def not_recorded() -> CurvoptError:
    """The loss was made elsewhere."""
    return CurvoptError(
        "the loss was not computed in the recorded pass, or was changed in place after it was "
        "computed: compute the forward pass and the loss inside it"
    )


def paired_otherwise(first: Reading, second: Reading) -> CurvoptError:
    """Row i of one tensor goes with row j of another."""
    return Coupled(
        f"samples are not separate: along {first} and along {second} the rows stand in different "
        "orders, so that a row of one meets another sample's row of the other (a flip, a roll or a "
        "permutation of one of them?). Bring both into the same order"
    )
