from elo.common.errors import exit_status
from elo.generation.chat import main

exit_status(main)
