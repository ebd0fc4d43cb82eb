"""On the path of every process of a step: one that crashes, or gets SIGABRT, leaves its stack traces in a file."""

import faulthandler
import os

if "STEP_STACKS" in os.environ:
    file = open(os.path.join(os.environ["STEP_STACKS"], str(os.getpid())), "w")  # noqa: SIM115  # open until the end
    faulthandler.enable(file)
