"""Other layouts of data sets, turned into RecBole's atomic files. A module per layout; files are read in chunks."""

from recbole_slifmr.data.convert.kgat import convert_kgat
from recbole_slifmr.data.convert.mmrec import convert_mmrec
from recbole_slifmr.data.convert.source import open_binary
from recbole_slifmr.data.convert.table import Columns, convert_tables
from recbole_slifmr.data.convert.target import Summary

__all__ = ["Columns", "Summary", "convert_kgat", "convert_mmrec", "convert_tables", "open_binary"]
