__version__ = "0.1.0"

# What `import latentrefine as lr` offers; each name is imported from its module at first use.
_OFFERED = {"Study": "study", "basin_profile": "evaluation", "evaluate": "evaluation",
            "evaluate_drafts": "evaluation", "load": "refine", "Refined": "refine", "TextRefiner": "refine",
            "widget": "refine"}
__all__ = ["__version__", *_OFFERED]


def __getattr__(name):
    if name not in _OFFERED:
        raise AttributeError(f"latentrefine has no {name}; it offers {', '.join(_OFFERED)}")
    from importlib import import_module

    from .core import cold_start
    with cold_start(): return getattr(import_module(f"latentrefine.{_OFFERED[name]}"), name)


def __dir__(): return __all__
