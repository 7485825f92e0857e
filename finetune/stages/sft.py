"""`ft sft`: supervised fine-tuning of a recipe.

check recipe, output and data -> load the base -> put the adapter on -> train -> save and report. Nothing is written
before everything that can be checked has been checked.
"""

from __future__ import annotations

from finetune import training
from finetune.adapters import limits
from finetune.adapters.build import apply, check, loads_trainable, prepare
from finetune.data import dataset
from finetune.data.chat import make_encoder
from finetune.families import family
from finetune.models import hardware, loading
from finetune.models.quantization import is_held_quantized
from finetune.models.rope import check_length
from finetune.recipe import SftRecipe
from finetune.run import check_resumable, open_run


def run(raw: SftRecipe, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    machine = hardware.detect()
    recipe = training.resolved(raw, machine)
    if resume:
        check_resumable(recipe)
    limits.check(recipe)
    config = loading.read_config(recipe.model)
    limits.check_base(recipe, config)
    if recipe.model.adapter is None:
        check(loading.skeleton(recipe.model), recipe.adapter, is_held_quantized(recipe.model, config))
    tokenizer = loading.load_tokenizer(recipe.model)
    encoder = make_encoder(tokenizer, family(config["model_type"]))
    data = dataset.load_sft(recipe.data, encoder, seed=recipe.train.seed, eval_data=recipe.eval.data)
    too_long = check_length(config, recipe.model, training.longest_row(data.train))
    plan = training.layout(recipe, len(data.train), len(data.train), machine)
    said = (too_long, training.few_rows(recipe, len(data.train)), training.other_devices(recipe))
    inputs = training.known_inputs(recipe, tokenizer, encoder.template, resume, dry_run)
    if dry_run:
        training.announce(data.warnings, plan.total_steps, *said, training.packing_outlook(recipe))
        training.show_plan(recipe, data.counts, plan)
        return

    training.start(recipe)
    base = loading.load_model(recipe.model, training.weights_dtype(recipe), machine)
    loading.refuse_training(base, recipe.model.name)
    if recipe.model.adapter is None:
        model = apply(base, recipe.adapter, tokenizer, loading.folder(recipe.model))
    else:
        start = loading.adapter_folder(recipe.model.adapter)
        model = loading.attach_adapter(base, start, recipe.model, trainable=loads_trainable(start))
        prepare(model)
    rows, packing_note = training.pack_if_isolated(recipe, model, tokenizer, data.train)
    plan = training.layout(recipe, len(data.train), len(rows), machine)
    notes = training.announce(data.warnings, plan.total_steps, packing_note, *said)

    with open_run(recipe, overwrite, resume) as folder:
        trainer = training.make_trainer(recipe, folder, model, tokenizer, rows, data.eval, plan, machine)
        outcome = training.fit(trainer, folder, resume, inputs)
        weights = training.save(recipe, folder, model, tokenizer, encoder.template)
        training.finish(recipe, folder, trainer, outcome, data.counts, notes)
        training.summary(recipe, folder, weights)
