"""Whether a truth is asked for by an `assert`, which tracing skips: `torch.fx` knows the byte code of old Pythons."""

import dis
from types import FrameType

_FAILS = "LOAD_ASSERTION_ERROR"


def passing_truth(frame: FrameType | None) -> bool | None:
    """The truth with which an `assert` passes that `frame` is at; None if it is at none."""
    if frame is None:
        return None
    instructions = list(dis.get_instructions(frame.f_code))
    here = next(i for i, instruction in enumerate(instructions) if instruction.offset >= frame.f_lasti)
    # Python 3.13 takes the truth before it jumps, in an instruction of its own.
    jump = next((i for i in (here, here + 1) if "JUMP" in instructions[i].opname and "_IF_" in instructions[i].opname),
                None)
    if jump is None or not instructions[jump].opname.endswith(("TRUE", "FALSE")):
        return None
    if_true = instructions[jump].opname.endswith("TRUE")
    target = next(instruction for instruction in instructions if instruction.offset == instructions[jump].argval)
    if instructions[jump + 1].opname == _FAILS:
        return if_true
    return not if_true if target.opname == _FAILS else None
