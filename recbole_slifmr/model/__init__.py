"""Models; each is a RecBole model of its own."""

MODELS = ("SLIFMR", "LATTICE", "FREEDOM", "BM3", "VBPR", "XSimGCL", "LightKG", "AdaKG", "CEASE", "AddEASE", "L3AE")
