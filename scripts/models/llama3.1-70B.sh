MODEL_ARGS=(
   --swiglu
   --num-layers 80
   --hidden-size 8192
   --ffn-hidden-size 28672
   --num-attention-heads 64
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --disable-bias-linear
   --normalization "RMSNorm"
   --norm-epsilon 1e-5
   --use-rotary-position-embeddings
   --rotary-base 500000
   --use-rope-scaling
   --rotary-scaling-factor 8
   --vocab-size 128256
   --untie-embeddings-and-output-weights
)
