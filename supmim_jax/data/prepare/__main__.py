"""Prepares the images that training reads: a data set of tfds, a copy of one, or a folder.

  python -m supmim_jax.data.prepare --name imagenet2012 --manual_dir /archives --data_dir /data
  python -m supmim_jax.data.prepare --from_tfrecord /tfds/imagenet2012/5.1.0 --data_dir /data
  python -m supmim_jax.data.prepare --image_folder /photos --as birds --data_dir /data

Add --dry_run to see what would be written, and whether there is room. What is written can be opened
when it is complete, not before. Killed, the same command goes on with the shards that are missing
(the first form begins anew: its builder is tfds's own). The last lines say how to train on it.
"""

from absl import flags
from etils import epath

from supmim_jax import cli, storage
from supmim_jax.data.prepare import catalogue, folder, tfrecords
from supmim_jax.errors import SetupError

# What each form takes beside --data_dir and --dry_run.
FORMS = {
    "name": ("manual_dir", "verify"),
    "from_tfrecord": (),
    "image_folder": ("as", "val_fraction", "no_decode", "skip_broken", "follow_links", "max_value"),
}


def main() -> None:
    values = flags.FLAGS.flag_values_dict()
    form = check_flags(values)
    options = {flag: values[flag] for flag in ("data_dir", "dry_run", *FORMS[form])}
    try:
        if form == "name":
            text = catalogue.prepare(values["name"], **options)
        elif form == "from_tfrecord":
            text = tfrecords.prepare(epath.Path(values["from_tfrecord"]), **options)
        else:
            name = options.pop("as")
            text = folder.prepare(epath.Path(values["image_folder"]), name, **options)
    except OSError as error:
        raise SetupError(f"Cannot be read or written: {error}.") from None
    print(text)


def check_flags(values: dict) -> str:
    """The form of the flags, a key of FORMS; raises SetupError if they are of none, or of two."""
    forms = [form for form in FORMS if values[form]]
    if len(forms) != 1:
        found = ", ".join(f"--{form}" for form in forms) or "none"
        raise SetupError(f"Give one of {', '.join(f'--{form}' for form in FORMS)}; found {found}.")
    for form, own in FORMS.items():
        for flag in own:
            if values[flag] and form != forms[0]:
                raise SetupError(f"--{flag} belongs to --{form}, and --{forms[0]} was given.")
    if forms == ["image_folder"] and not values["as"]:
        raise SetupError("--image_folder needs --as <name>: what the data set is to be called.")
    return forms[0]


if __name__ == "__main__":
    flags.DEFINE_string("name", "", "A data set of tfds: <name>[/<config>][:<version>].")
    copy = "Directory of a prepared TFRecord copy, one version."
    storage.define("from_tfrecord", "", copy, searched=False)
    images = "Directory with train/<class>/ and val/<class>/."
    storage.define("image_folder", "", images, searched=False)
    storage.define("data_dir", "", "Where data sets go; tfds's default if empty.")
    manual = "--name: files that you downloaded yourself; <data_dir>/downloads/manual if empty."
    storage.define("manual_dir", "", manual, searched=False)
    flags.DEFINE_bool("verify", False, "--name imagenet2012: also the archives' MD5.")
    flags.DEFINE_string("as", "", "--image_folder: name of the data set.")
    share = "--image_folder: of each class, for validation, if the folder has no val/."
    flags.DEFINE_float("val_fraction", 0.0, share, lower_bound=0.0, upper_bound=0.9)
    flags.DEFINE_bool("no_decode", False, "--image_folder: look at first bytes only.")
    flags.DEFINE_bool("skip_broken", False, "--image_folder: leave out what is no image.")
    flags.DEFINE_bool("follow_links", False, "--image_folder: links may lead out of it.")
    white = "--image_folder: white in images of more than 8 bits; 0: such images are refused."
    flags.DEFINE_float("max_value", 0.0, white, lower_bound=0.0)
    flags.DEFINE_bool("dry_run", False, "Say what would be written, and write nothing.")
    cli.start(main)
