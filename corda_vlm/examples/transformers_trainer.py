"""Fine-tune a vision-language model with transformers' Trainer, on JSON lines with `image` (a path), `question` and `answer`.

python -m corda_vlm.examples.transformers_trainer my-llava kept.jsonl training.jsonl my-adapter
"""

import sys

from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import corda_vlm
from corda_vlm.data.samples import Collator

model_path, kept_path, training_path, output = sys.argv[1:]
arguments = TrainingArguments(
    output,
    max_steps=50,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    logging_steps=10,
    remove_unused_columns=False,  # the collator reads them
    save_strategy="no",  # `export` writes what is wanted
)
processor = AutoProcessor.from_pretrained(model_path)
model = AutoModelForImageTextToText.from_pretrained(model_path).to(arguments.device)
kept, training = Dataset.from_json(kept_path), Dataset.from_json(training_path)
model = corda_vlm.prepare(model, kept, mode="kpm", rank=8, processor=processor)
keep = corda_vlm.KeepCallback(corda_vlm.Keep(kept, every=4), processor)  # every fourth step holds to the base; leave out to save time
collate = Collator(processor, with_labels=True)
trainer = Trainer(model, arguments, train_dataset=training, data_collator=collate, callbacks=[keep])
trainer.train()
if trainer.is_world_process_zero():
    corda_vlm.export(model, output)
