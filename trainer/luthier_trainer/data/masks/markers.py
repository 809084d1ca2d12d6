"""Words that stand for contents when it is tried out what a template does with them: no row says them."""

MARKERS = ("Zqx7vLuthierKw", "Hjw3gMarkerYz", "Bnk5tSignRq", "Wpd2cTokenVf", "Xmt9sLabelGh")
