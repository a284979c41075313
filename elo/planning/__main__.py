from elo.common.errors import exit_status
from elo.planning.plan import main

exit_status(main)
