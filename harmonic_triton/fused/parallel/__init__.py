"""Class vectors whose rows are spread over processes: the losses by ``torch.distributed``."""
