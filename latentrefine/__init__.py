__version__ = "0.1.0"

# What `import latentrefine as lr` offers; each is imported from its module when it is first used.
_OFFERED = {"Study": "study", "load": "refine", "Refined": "refine", "TextRefiner": "refine", "widget": "refine",
            "evaluate": "evaluation", "evaluate_drafts": "evaluation", "basin_profile": "evaluation"}
__all__ = ["__version__", *_OFFERED]


def __getattr__(name):
    if name not in _OFFERED: raise AttributeError(f"latentrefine has no {name}; it offers {', '.join(_OFFERED)}")
    from importlib import import_module
    return getattr(import_module(f"latentrefine.{_OFFERED[name]}"), name)


def __dir__(): return __all__
