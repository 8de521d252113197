"""The exit statuses of the command line that launchers tell apart. 0 and 1 are as everywhere; launch/ has the same numbers."""

WRONG_USE_STATUS = 2  # what the user must change: field, value and remedy are in the message
CERTAIN_STATUS = 3  # failed, and the same command will fail again: no launcher starts it again
RESTART_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the run stopped after saving; start it again
BROKEN_PIPE_STATUS = 141  # what shells give for SIGPIPE: the program that read the output has ended, as `head -1` does
INTERRUPTED_STATUS = 130  # what shells give for Ctrl-C: a person stopped the run, so no launcher should start it again


class CertainFailure(Exception):
    """The command failed, and the same command will fail again, as at the same step on the same data. Exit status 3."""
