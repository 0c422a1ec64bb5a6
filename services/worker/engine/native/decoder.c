/* A whole forward pass, layer after layer, by a team of threads: what Python calls.
 *
 * The residual stream goes to and fro between two buffers, since a product that is summed up in several depths keeps its
 * sums where its result goes: attention reads `hidden` and writes `between`, the MLP writes `hidden` again. */
#include <string.h>

#include "kernels.h"

typedef struct {
    const rh_decoder *decoder;
    const rh_pass *pass;
    float *logits;
} job;

typedef struct {
    const rh_decoder *decoder;
    const rh_pass *pass;
    rh_team *team;
    int round;
    float *scratch;
} hand; /* one thread at work on a job */

static float *plain_row(const hand *h, const rh_linear *linear, int row) {
    const rh_rows *input = &h->pass->input;
    if (!RH_IS_ROUNDED(linear->kind)) return (float *)input->data + (size_t)row * linear->inputs;
    return input->plain ? input->plain + (size_t)row * linear->true_inputs : h->scratch;
}

/* Norm of each row of `from`, ready for `linear`. */
static void take_norms(hand *h, const rh_norm *norm, const rh_linear *linear, const float *from) {
    const int size = h->decoder->hidden_size;
    for (int first, last; rh_next(h->team, &h->round, h->pass->rows, 1, &first, &last);) {
        float *row = plain_row(h, linear, first);
        rh_norm_row(h->decoder, norm, from + (size_t)first * size, row);
        rh_store_row(linear->kind, row, linear->true_inputs, linear->inputs, &h->pass->input, first);
    }
    rh_barrier(h->team);
}

static void take_mixed(hand *h, const rh_linear *linear) {
    for (int first, last; rh_next(h->team, &h->round, h->pass->rows, 1, &first, &last);) {
        float *row = plain_row(h, linear, first);
        memcpy(row, h->pass->mixed + (size_t)first * linear->true_inputs, sizeof(float) * linear->true_inputs);
        rh_store_row(linear->kind, row, linear->true_inputs, linear->inputs, &h->pass->input, first);
    }
    rh_barrier(h->team);
}

static void take_activations(hand *h, const rh_linear *wide, const rh_linear *linear) {
    for (int first, last; rh_next(h->team, &h->round, h->pass->rows, 1, &first, &last);) {
        float *row = plain_row(h, linear, first);
        rh_activate_row(h->decoder, h->pass->wide + (size_t)first * wide->outputs, row);
        rh_store_row(linear->kind, row, linear->true_inputs, linear->inputs, &h->pass->input, first);
    }
    rh_barrier(h->team);
}

static float dot(const float *a, const float *b, int size) {
    rh_vec sum = v_zero();
    for (int i = 0; i < size; i += 16) {
        rh_mask mask = v_first(size - i);
        sum = v_fma(v_load_part(mask, a + i), v_load_part(mask, b + i), sum);
    }
    return v_sum(sum);
}

/* product: 0 qkv, 1 attention output, 2 MLP in, 3 MLP out. */
static void add_adapters(hand *h, const rh_linear *linear, int layer, int product, float *y) {
    for (int row, last; rh_next(h->team, &h->round, h->pass->rows, 1, &row, &last);) {
        const rh_adapter *adapter = h->pass->adapters[row];
        const rh_lora *lora = adapter ? &adapter->products[layer * 4 + product] : NULL;
        if (!lora || !lora->rank) continue;
        const float *x = plain_row(h, linear, row);
        float *low = h->scratch;
        for (int r = 0; r < lora->rank; r++) low[r] = dot(lora->down + (size_t)r * lora->inputs, x, lora->inputs);
        for (int o = 0; o < lora->outputs; o++)
            y[(size_t)row * linear->outputs + o] += dot(lora->up + (size_t)o * lora->rank, low, lora->rank);
    }
    rh_barrier(h->team);
}

/* Panel after panel, each checked while it is in the cache. */
static void multiply_and_check(hand *h, const rh_linear *linear, int first, int last, const float *residual, float *y) {
    for (int panel = first; panel < last; panel++) {
        rh_multiply_panels(linear, &h->pass->input, h->pass->rows, panel, panel + 1, residual, linear->outputs, y);
        if (rh_panel_sum(linear, panel) != linear->sums[panel]) __atomic_store_n(h->pass->damaged, 1, __ATOMIC_RELAXED);
    }
}

static void multiply(hand *h, const rh_linear *linear, int layer, int product, const float *residual, float *y) {
    const int panels = (linear->outputs + RH_PANEL - 1) / RH_PANEL;
    const int pieces = h->pass->threads * 4;
    const int size = panels < pieces ? 1 : panels / pieces;
    for (int first, last; rh_next(h->team, &h->round, panels, size, &first, &last);) {
        if (linear->sums)
            multiply_and_check(h, linear, first, last, residual, y);
        else
            rh_multiply_panels(linear, &h->pass->input, h->pass->rows, first, last, residual, linear->outputs, y);
    }
    rh_barrier(h->team);
    if (h->pass->adapters && product >= 0) add_adapters(h, linear, layer, product, y);
}

static void attend(hand *h, int layer) {
    const int kv_heads = h->decoder->kv_heads;
    int first, last;
    while (rh_next(h->team, &h->round, h->pass->rows, 1, &first, &last))
        rh_place_row(h->decoder, h->pass, layer, first);
    rh_barrier(h->team);
    while (rh_next(h->team, &h->round, h->pass->rows * kv_heads, 1, &first, &last))
        rh_attend(h->decoder, h->pass, layer, first / kv_heads, first % kv_heads, h->scratch);
    rh_barrier(h->team);
}

static void run_layer(hand *h, int layer) {
    const rh_layer *weights = &h->decoder->layers[layer];
    float *hidden = h->pass->hidden, *between = h->pass->between;
    take_norms(h, &weights->attention_norm, &weights->qkv, hidden);
    multiply(h, &weights->qkv, layer, 0, NULL, h->pass->wide);
    attend(h, layer);
    take_mixed(h, &weights->attention_output);
    multiply(h, &weights->attention_output, layer, 1, hidden, between);
    const rh_norm *norm = weights->mlp_norm.weight ? &weights->mlp_norm : &weights->attention_norm;
    take_norms(h, norm, &weights->mlp_in, h->decoder->residual == RH_SEQUENTIAL ? between : hidden);
    multiply(h, &weights->mlp_in, layer, 2, NULL, h->pass->wide);
    take_activations(h, &weights->mlp_in, &weights->mlp_out);
    multiply(h, &weights->mlp_out, layer, 3, between, hidden);
}

static hand take_up(const job *work, rh_team *team, int thread) {
    const rh_pass *pass = work->pass;
    return (hand){work->decoder, pass, team, 0, pass->row_scratch + (size_t)thread * pass->row_floats};
}

static void forward(void *argument, rh_team *team, int thread) {
    hand h = take_up(argument, team, thread);
    for (int layer = 0; layer < h.decoder->layer_count; layer++) run_layer(&h, layer);
}

static void score(void *argument, rh_team *team, int thread) {
    hand h = take_up(argument, team, thread);
    const rh_linear *head = &h.decoder->head;
    take_norms(&h, &h.decoder->final_norm, head, h.pass->hidden);
    multiply(&h, head, 0, -1, NULL, ((job *)argument)->logits);
}

/* Writes the rows' keys and values to the pool, and leaves in `hidden` what the last layer made of it. */
void rh_forward(const rh_decoder *decoder, const rh_pass *pass) {
    job work = {decoder, pass, NULL};
    rh_run(pass->threads, forward, &work);
}

/* logits: (rows, vocabulary) of pass->hidden. */
void rh_logits(const rh_decoder *decoder, const rh_pass *pass, float *logits) {
    job work = {decoder, pass, logits};
    rh_run(pass->threads, score, &work);
}

/* So that Python can check, whenever it loads the library, that it means the same structs. */
int64_t rh_struct_bytes(int which) {
    const int64_t bytes[] = {sizeof(rh_norm), sizeof(rh_linear), sizeof(rh_lora), sizeof(rh_adapter),
                             sizeof(rh_layer), sizeof(rh_decoder), sizeof(rh_rows), sizeof(rh_pass)};
    return bytes[which];
}
