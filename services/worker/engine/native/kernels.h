/* What the files of this folder share. `bindings.py` repeats the structs: change both together (a test compares sizes).
 * Sizes are in elements unless a name says bytes. Everything is fp32 except weights, KV blocks and rounded rows. */
#ifndef RH_KERNELS_H
#define RH_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "vector.h"

#define RH_BLOCK_TOKENS 16 /* tokens of a KV block: one vector of scores */
#define RH_PANEL 32        /* outputs that a weight panel interleaves: two vectors of sums */
#define RH_GROUP 32        /* inputs that share an int8 scale, of activations and of weights */

enum { RH_FP32 = 0, RH_BF16 = 1, RH_INT8 = 2 };
/* Whether rows are rounded for products of such weights: to bf16 only where the processor multiplies it faster. */
#ifdef RH_BF16_ROWS
#define RH_IS_ROUNDED(kind) ((kind) != RH_FP32)
#else
#define RH_IS_ROUNDED(kind) ((kind) == RH_INT8)
#endif

enum { RH_NORM_RMS = 0, RH_NORM_LAYER = 1 };
enum { RH_SILU = 0, RH_GELU = 1, RH_GELU_TANH = 2, RH_RELU = 3 };
enum { RH_SEQUENTIAL = 0, RH_PARALLEL = 1, RH_PARALLEL_TWO_NORMS = 2 };

/* weight NULL: there is no such norm. bias NULL: none. */
typedef struct {
    const float *weight;
    const float *bias;
} rh_norm;

/* A product's weights in panels of RH_PANEL outputs. `inputs` is padded to a multiple of RH_GROUP, `outputs` is not.
 * packed: fp32 [panel][input][32]; bf16 [panel][input / 2][32][2]; int8 [panel][input / 4][32][4], stored plus 128.
 * scales: int8 only, bf16 [panel][group][32]. bias: may be NULL. sums: of each panel (checks.c), to be compared when it is read;
 * NULL where that was done. */
typedef struct {
    int32_t kind;
    int32_t outputs;
    int32_t inputs;
    int32_t true_inputs;
    const void *packed;
    const uint16_t *scales;
    const float *bias;
    const uint64_t *sums;
} rh_linear;

/* Low-rank addition to one product: y += up (down x). down: (rank, inputs), up: (outputs, rank), scale folded in. */
typedef struct {
    int32_t rank;
    int32_t inputs;
    int32_t outputs;
    const float *down;
    const float *up;
} rh_lora;

/* An adapter's additions: [layer][4] in the order qkv, attention_output, mlp_in, mlp_out; rank 0: none. */
typedef struct {
    const rh_lora *products;
} rh_adapter;

typedef struct {
    rh_norm attention_norm;
    rh_norm mlp_norm; /* weight NULL: attention and MLP read the same norm */
    const float *query_norm;
    const float *key_norm;
    rh_linear qkv;
    rh_linear attention_output;
    rh_linear mlp_in;
    rh_linear mlp_out;
} rh_layer;

/* cos, sin: (positions, rotary_dim / 2), NULL without rotary positions. slopes: (heads,) of ALiBi, else NULL. */
typedef struct {
    int32_t layer_count;
    int32_t hidden_size;
    int32_t intermediate_size;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t norm_kind;
    int32_t activation;
    int32_t is_gated;
    int32_t residual;
    int32_t rotary_dim;
    int32_t is_interleaved;
    int32_t kind;
    int32_t kv_kind;
    float norm_eps;
    float score_scale;
    const float *cos;
    const float *sin;
    const float *slopes;
    const rh_layer *layers;
    rh_norm final_norm;
    rh_linear head;
} rh_decoder;

/* Rows ready to be multiplied: fp32, bf16, or int8 with a scale for each group of RH_GROUP inputs of each row; `offsets` takes
 * back what storing weights plus 128 adds: -128 x the sum of the group. plain: rounded rows only, and only where adapters need
 * them in fp32: rows of true_inputs. */
typedef struct {
    void *data;
    float *scales;
    int32_t *offsets;
    float *plain;
} rh_rows;

/* One forward pass. positions, table_starts: per row; a row's block table begins at tables[table_starts[row]] and covers
 * its position. adapters: per row, NULL or an adapter; the array itself is NULL when no row has one.
 * pool: (layers, 2, blocks, kv_heads, 16, head_dim) in kv_kind, inside a block laid out as attention.c says.
 * hidden: (rows, hidden_size), in and out. The rest is scratch: between (rows, hidden_size), wide (rows, widest product),
 * mixed (rows, heads x head_dim), and row_scratch (threads, row_floats): one row, or one row's scores of four heads.
 * damaged: becomes 1 where a panel's sum is not what it should be; what the pass has made is then worth nothing. */
typedef struct {
    int32_t rows;
    int32_t threads;
    const int32_t *positions;
    const int32_t *table_starts;
    const int32_t *tables;
    const rh_adapter *const *adapters;
    void *pool;
    int64_t pool_blocks;
    float *hidden;
    float *between;
    rh_rows input;
    float *wide;
    float *mixed;
    float *row_scratch;
    int64_t row_floats;
    int32_t *damaged;
} rh_pass;

/* linear.c */
void rh_multiply_panels(const rh_linear *linear, const rh_rows *x, int rows, int first_panel, int last_panel,
                        const float *residual, int y_stride, float *y);
/* checks.c */
uint64_t rh_panel_sum(const rh_linear *linear, int panel);
void rh_panel_sums(const rh_linear *linear, uint64_t *sums);
/* rows.c */
void rh_norm_row(const rh_decoder *decoder, const rh_norm *norm, const float *x, float *y);
void rh_head_norm(float *head, const float *weight, int head_dim, float eps);
void rh_activate_row(const rh_decoder *decoder, const float *x, float *y);
void rh_store_row(int kind, const float *x, int true_inputs, int inputs, const rh_rows *rows, int row);
rh_vec rh_exp(rh_vec x);
/* attention.c */
void rh_place_row(const rh_decoder *decoder, const rh_pass *pass, int layer, int row);
void rh_attend(const rh_decoder *decoder, const rh_pass *pass, int layer, int row, int kv_head, float *scores);
/* threads.c */
typedef struct rh_team rh_team;
typedef void (*rh_work)(void *argument, rh_team *team, int thread);
void rh_run(int threads, rh_work work, void *argument);
void rh_barrier(rh_team *team);
int rh_next(rh_team *team, int *round, int count, int size, int *first, int *last);
/* decoder.c: what Python calls */
void rh_forward(const rh_decoder *decoder, const rh_pass *pass);
void rh_logits(const rh_decoder *decoder, const rh_pass *pass, float *logits);
int64_t rh_struct_bytes(int which);

#endif
