"""Where the recipes that are shipped by name are found.

In: nothing but where this file lies. Out: the folder of the recipes, and the names it holds. What is in a recipe is
not read here. An installed wheel carries the folder inside the package, a checkout (uninstalled, or installed with
``pip install -e``) has it next to the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def registry_dir() -> Path:
    """Find the folder with one JSON recipe per model shipped by name.

    Returns:
        The wheel's ``se_surgery/_registry``, or else the checkout's ``registry``.

    Raises:
        FileNotFoundError: Neither is there, so the installation is damaged.
    """
    places = (_PACKAGE / "_registry", _PACKAGE.parent / "registry")
    for place in places:
        if place.is_dir():
            return place
    looked_in = " and ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"se-surgery's own recipes are missing: looked in {looked_in}. Reinstall it: pip install --force-reinstall "
        "--no-deps se-surgery."
    )


def recipe_names() -> list[str]:
    """List the models shipped by name.

    Returns:
        The stems of the recipe files, sorted. A stem is the name that ``timm.create_model`` takes.
    """
    return sorted(path.stem for path in registry_dir().glob("*.json"))
