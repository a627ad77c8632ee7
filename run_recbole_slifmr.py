"""Run a RecBole model or a command of this package: ``python run_recbole_slifmr.py --model=SLIFMR``."""

from recbole_slifmr.cli import run_script

if __name__ == "__main__":
    run_script()
