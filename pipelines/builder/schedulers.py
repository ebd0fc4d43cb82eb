"""The environment variables in which cluster schedulers number their jobs, for `--part auto`.

The documentation of each scheduler defines them. Slurm, torchrun and Open MPI number the processes of one job; the
other schedulers, and Slurm as well, number the jobs of an array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class Scheduler:
    """The variables of one scheduler. A number in place of a name is a constant that the scheduler always uses.

    Attributes:
        name: the name of the scheduler.
        index: the variable with the number of the job or process.
        first: the variable with the lowest number of the array, or a constant.
        step: the variable with the distance between two numbers of the array, or a constant.
        count: the variable with the number of jobs or processes; None if the scheduler provides none.
        last: the variable with the highest number of the array, which is used if there is no `count`.
        array: the option or field that submits an array of N jobs, numbered without gaps.
        outside: the number of a job that belongs to no array; None if the variable is not set then.
        processes: the variables that number the processes in each job of the array; None if they cannot be relied on,
            because RANK, for example, may be the number of the job.
    """

    name: str
    index: str
    first: str | int = 0
    step: str | int = 1
    count: str | None = None
    last: str | None = None
    array: str | None = None
    outside: int | None = None
    processes: Scheduler | None = None


_SLURM = Scheduler("Slurm", "SLURM_PROCID", count="SLURM_NTASKS")
PROCESSES = (
    _SLURM,
    Scheduler("torchrun", "RANK", count="WORLD_SIZE"),
    Scheduler("Open MPI", "OMPI_COMM_WORLD_RANK", count="OMPI_COMM_WORLD_SIZE"),
)
ARRAYS = (
    Scheduler(
        "Slurm array",
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_STEP",
        count="SLURM_ARRAY_TASK_COUNT",
        array="--array=1-N",
        processes=_SLURM,
    ),
    Scheduler("Kubernetes Indexed Job", "JOB_COMPLETION_INDEX", array="completions: N"),
    Scheduler(
        "AWS Batch array job", "AWS_BATCH_JOB_ARRAY_INDEX", count="AWS_BATCH_JOB_ARRAY_SIZE", array="--array-properties"
    ),
    Scheduler("PBS array", "PBS_ARRAY_INDEX", 1, array="-J 1-N"),
    Scheduler("LSF array", "LSB_JOBINDEX", 1, last="LSB_JOBINDEX_END", array='-J "name[1-N]"', outside=0),
    Scheduler(
        "Grid Engine array", "SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_STEPSIZE", last="SGE_TASK_LAST", array="-t 1-N"
    ),
)


@dataclass(frozen=True)
class Place:
    """The place of this process among all processes of a build.

    Attributes:
        number: the number of the process, counted from 0.
        count: the number of processes.
        origin: the environment variables with their values, for messages.
    """

    number: int
    count: int
    origin: str


def place(environ: Mapping[str, str], count: int | None) -> Place:
    """Finds the place of this process among all processes of all jobs of an array.

    Args:
        environ: the environment variables.
        count: the number of jobs that the user gave, because some schedulers do not provide it; None if not given.

    Raises:
        UsageError: no scheduler has numbered this job; its number does not belong to the array; `count` is missing or
            wrong.
    """
    array = next((found for each in ARRAYS if (found := _array_place(environ, each, count))), None)
    if array:
        return array
    process = next((found for each in PROCESSES if (found := _process_place(environ, each))), None)
    if process is None:
        known = ", ".join(each.index for each in (*ARRAYS, *PROCESSES))
        raise UsageError(f"--part auto: none of {known} is set to a usable number; give --part i/n")
    if count not in (None, process.count):
        raise UsageError(f"--part auto/{count}: there are {process.count} processes ({process.origin})")
    return process


def _array_place(environ: Mapping[str, str], scheduler: Scheduler, count: int | None) -> Place | None:
    name, index = scheduler.name, _number(environ, scheduler.index)
    if index is None or index == scheduler.outside:
        return None
    first, step = _value(environ, scheduler.first, 0), max(1, _value(environ, scheduler.step, 1))
    jobs = _job_count(environ, scheduler, first, step)
    found = f"{scheduler.index}={index}"
    if jobs is None and count is None:
        raise UsageError(
            f"--part auto: {found}, but a {name} does not say how many jobs it has; give the number: --part auto/N"
        )
    if None not in (jobs, count) and jobs != count:
        raise UsageError(f"--part auto/{count}: the {name} has {jobs} jobs ({found})")
    total = jobs or count or 0
    number, rest = divmod(index - first, step)
    if rest or not 0 <= number < total:
        raise UsageError(
            f"--part auto: {found} is none of the {total} numbers from {first} in steps of {step} of a {name}; submit "
            f"one without gaps ({scheduler.array}), or give --part i/n"
        )
    job = Place(number, total, f"{found}, of {total}")
    inside = None if scheduler.processes is None else _process_place(environ, scheduler.processes)
    if inside is None or inside.count == 1:
        return job
    return Place(job.number * inside.count + inside.number, total * inside.count, f"{job.origin}; {inside.origin}")


def _job_count(environ: Mapping[str, str], scheduler: Scheduler, first: int, step: int) -> int | None:
    if scheduler.count is not None:
        return _number(environ, scheduler.count)
    last = None if scheduler.last is None else _number(environ, scheduler.last)
    return None if last is None else (last - first) // step + 1


def _process_place(environ: Mapping[str, str], scheduler: Scheduler) -> Place | None:
    assert scheduler.count is not None
    number, count = _number(environ, scheduler.index), _number(environ, scheduler.count)
    if number is None or count is None or number >= count:
        return None
    return Place(number, count, f"{scheduler.index}={number}, {scheduler.count}={count}")


def _value(environ: Mapping[str, str], name: str | int, default: int) -> int:
    """The value of a variable, or the constant itself; the default for a variable that is not set."""
    if isinstance(name, int):
        return name
    found = _number(environ, name)
    return default if found is None else found


def _number(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None
