MODEL_ARGS=(
   --swiglu
   --num-layers 126
   --hidden-size 16384
   --ffn-hidden-size 53248
   --num-attention-heads 128
   --group-query-attention
   --num-query-groups 8
   --disable-bias-linear
   --normalization "RMSNorm"
   --norm-epsilon 1e-5
   --use-rotary-position-embeddings
   --rotary-base 500000
   --use-rope-scaling
   --rotary-scaling-factor 8.0
   --vocab-size 128256
   --untie-embeddings-and-output-weights
)
