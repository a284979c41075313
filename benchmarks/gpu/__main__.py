from benchmarks.gpu import main
from elo.common.errors import exit_status

exit_status(main)
