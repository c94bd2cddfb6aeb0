"""Publish a finished run on the Hugging Face Hub: its model card, an allow-list of files, one commit.

    python -m lpl_finetuning.publish my-lora --hub_model_id me/my-lora      # what a run whose upload failed asks for

The token comes from HF_TOKEN or from `hf auth login`.
"""

from lpl_finetuning.errors import errors_for_people
from lpl_finetuning.flags import FlagParser
from lpl_finetuning.results.hub import PATIENCE, check_name, name_and_source, publish_or_exit


def main(argv=None):
    """The command that tries an upload again: exit status 0, 2 for a mistake of the user's, 3 for a failed upload."""
    parser = FlagParser(__doc__)
    add = parser.add_argument
    add("folder", help="output folder of the run")
    add("--hub_model_id", help="owner/name or name on the Hub (default: the folder's name)")
    add("--hub_token", help="prefer HF_TOKEN or `hf auth login`: other users of a machine can see command lines")
    add("--hub_private_repo", action="store_true", help="make the repository private, if it is a new one")
    add("--patience", type=float, default=PATIENCE, help="seconds that a failing request is tried again (%(default)s)")
    with errors_for_people(False):
        args = parser.parse(argv)
        repo_id, source = name_and_source(args.hub_model_id, args.folder)
        check_name(repo_id, source)
        publish_or_exit(args.folder, repo_id, args.hub_token, args.hub_private_repo, args.patience)


if __name__ == "__main__":
    main()
