"""What commands share.

Arguments: `arguments`, `pruning_arguments`, `downstream_arguments`, and `parsing` of the command line and YAML files.
Networks: `backbone`, `sparse_backbone`, `segmentation_model`, `saved_model`, and their Trainers, `classifier_trainer`
and `segmentation_trainer`.
One network pruned and fine-tuned: `pruning_run`, for a `job` of `classification_job` or `segmentation_job`.
Several networks on several tasks: `subjects`, `pruning_source`, `downstream_tasks`, `downstream_evaluation`.
What goes out: `folder`, `console`, `publishing`.
"""
