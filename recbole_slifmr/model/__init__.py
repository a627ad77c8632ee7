"""Models; each is a RecBole model of its own."""

MODELS = (
    "SLIFMR",
    "SLIFMRPaper",
    "LATTICE",
    "FREEDOM",
    "BM3",
    "VBPR",
    "XSimGCL",
    "MSCA",
    "MGCN",
    "SMORE",
    "LightKG",
    "AdaKG",
    "CEASE",
    "AddEASE",
    "L3AE",
    "IALS",
)
