"""The commands `se-surgery push` and `pull`: models to the Hugging Face Hub and from there.

In: a model by name, folder or repository, and a repository. Out: a commit, or a folder.
"""

from __future__ import annotations

from ..files.pretrained import pull_from_hub, push_to_hub
from . import options as cli
from .app import app, examples, open_model, progress, say


@app.command(
    epilog=examples(
        "se-surgery push se_resnext50_32x4d user/se_resnext50_32x4d --tag v1",
        "se-surgery push se_resnet50_pre user/se_resnet50_pre --private --license apache-2.0",
    )
)
def push(
    model: cli.Model,
    repo: cli.Repo,
    private: cli.Private = None,
    branch: cli.Branch = None,
    tag: cli.Tag = None,
    license: cli.License = None,
    base_model: cli.BaseModel = None,
    card_tag: cli.CardTag = None,
    plot: cli.Plot = None,
    message: cli.Message = "Save the model with se-surgery",
    size: cli.Size = None,
    pretrained: cli.Pretrained = False,
    as_json: cli.Json = False,
) -> None:
    """Push a model to the Hugging Face Hub, with a model card, in one commit."""
    patient = open_model(model, pretrained)
    with progress(f"Pushing to {repo}"):
        made = push_to_hub(
            patient.model,
            repo,
            base=patient.base,
            base_args=patient.base_args,
            private=private,
            revision=branch,
            tag=tag,
            message=message,
            license=license,
            base_model=base_model,
            tags=card_tag or (),
            plot=plot,
            example_input=size,
        )
    name = f"{repo}@{tag or branch}" if tag or branch else repo
    text = f"Pushed as {made}.\nLoad it with: import se_surgery; timm.create_model('hf-hub:{name}', pretrained=True)"
    say(as_json, {"commit": made, "model": f"hf-hub:{name}"}, text)


@app.command(
    epilog=examples(
        "se-surgery pull user/se_resnext50_32x4d -o se_resnext50_32x4d",
        "se-surgery pull user/se_resnext50_32x4d@v1 -o first --overwrite",
    )
)
def pull(repo: cli.Repo, output: cli.Output, overwrite: cli.Overwrite = False, as_json: cli.Json = False) -> None:
    """Fetch a model from the Hugging Face Hub, check it, and write it to a folder."""
    with progress(f"Fetching {repo}"):
        commit = pull_from_hub(repo, output, overwrite=overwrite)
    say(as_json, {"commit": commit, "output": str(output)}, f"{commit} written to {output}.")
