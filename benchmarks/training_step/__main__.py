from benchmarks.training_step import main
from elo.common.errors import exit_status

exit_status(main)
