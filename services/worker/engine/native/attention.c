/* Keys and values in paged blocks, and attention of one row over them.
 *
 * Inside a block of 16 tokens keys lie [head_dim / 2][token][2] and values [token / 2][head_dim][2]: one vector then holds a
 * pair of channels of all 16 tokens, or a pair of tokens for 16 channels, in fp32 as two vectors. A row looks at its own
 * sequence alone and in the order of its tokens, so the result does not depend on how a prompt was cut.
 *
 * A NaN in a value of another row's token never counts: tokens beyond a row are not multiplied at all. */
#include <math.h>
#include <string.h>

#include "kernels.h"

/* Query heads that share a key head are worked off so many at a time, and channels of the output held in registers at once,
 * in vectors of 16. */
#ifdef __AVX512F__
#define MOST_HEADS 4
#define CHANNEL_VECTORS 4
#else
#define MOST_HEADS 2
#define CHANNEL_VECTORS 2
#endif

static size_t kv_bytes(const rh_decoder *decoder) { return decoder->kv_kind == RH_FP32 ? 4 : 2; }

static char *kv_block(const rh_decoder *decoder, const rh_pass *pass, int layer, int is_value, int block, int kv_head) {
    size_t index = ((size_t)(layer * 2 + is_value) * pass->pool_blocks + block) * decoder->kv_heads + kv_head;
    return (char *)pass->pool + index * RH_BLOCK_TOKENS * decoder->head_dim * kv_bytes(decoder);
}

/* To nearest, ties to even; NaN stays NaN. */
static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

static void put(const rh_decoder *decoder, char *block, size_t index, float value) {
    if (decoder->kv_kind == RH_FP32)
        ((float *)block)[index] = value;
    else
        ((uint16_t *)block)[index] = to_bf16(value);
}

static void rotate(const rh_decoder *decoder, float *head, int position) {
    const int half = decoder->rotary_dim / 2;
    const float *cos = decoder->cos + (size_t)position * half, *sin = decoder->sin + (size_t)position * half;
    for (int i = 0; i < half; i++) {
        float *a = decoder->is_interleaved ? head + 2 * i : head + i;
        float *b = decoder->is_interleaved ? a + 1 : a + half;
        float x = *a, y = *b;
        *a = x * cos[i] - y * sin[i];
        *b = y * cos[i] + x * sin[i];
    }
}

/* One row of the fused product: norms and turns queries and keys in place, writes key and value to their block. */
void rh_place_row(const rh_decoder *decoder, const rh_pass *pass, int layer, int row) {
    const rh_layer *weights = &decoder->layers[layer];
    const int head_dim = decoder->head_dim, heads = decoder->heads, kv_heads = decoder->kv_heads;
    const int position = pass->positions[row], token = position % RH_BLOCK_TOKENS;
    const int block = pass->tables[pass->table_starts[row] + position / RH_BLOCK_TOKENS];
    float *x = pass->wide + (size_t)row * weights->qkv.outputs;
    for (int head = 0; head < heads + kv_heads; head++) {
        const float *norm = head < heads ? weights->query_norm : weights->key_norm;
        if (norm) rh_head_norm(x + (size_t)head * head_dim, norm, head_dim, decoder->norm_eps);
        if (decoder->rotary_dim) rotate(decoder, x + (size_t)head * head_dim, position);
    }
    for (int i = 0; i < heads * head_dim; i++) x[i] *= decoder->score_scale;
    for (int head = 0; head < kv_heads; head++) {
        const float *key = x + (size_t)(heads + head) * head_dim, *value = key + (size_t)kv_heads * head_dim;
        char *keys = kv_block(decoder, pass, layer, 0, block, head);
        char *values = kv_block(decoder, pass, layer, 1, block, head);
        for (int i = 0; i < head_dim; i++) {
            put(decoder, keys, (size_t)(i / 2) * 2 * RH_BLOCK_TOKENS + 2 * token + i % 2, key[i]);
            put(decoder, values, (size_t)(token / 2) * 2 * head_dim + 2 * i + token % 2, value[i]);
        }
    }
}

/* 32 numbers as pairs: the first of each pair, and the second. */
RH_INLINE void load_pairs(const int is_fp32, const char *at, rh_vec *first, rh_vec *second) {
    if (is_fp32) {
        v_unzip((const float *)at, first, second);
    } else {
        *first = v_even_bf16((const uint16_t *)at);
        *second = v_odd_bf16((const uint16_t *)at);
    }
}

/* scores: (heads, stride): query . key for the 16 tokens of one block. next: the block that is read after it, fetched
 * meanwhile: blocks lie anywhere, so the processor does not guess them. */
RH_INLINE void score_block(const int is_fp32, const int heads, const char *keys, const char *next, const float *queries,
                           int head_dim, float *scores, size_t stride) {
    rh_vec first_sums[MOST_HEADS], second_sums[MOST_HEADS];
    RH_UNROLL for (int h = 0; h < heads; h++) first_sums[h] = second_sums[h] = v_zero();
    for (int pair = 0; pair < head_dim / 2; pair++) {
        rh_vec first, second;
        const size_t place = (size_t)pair * (is_fp32 ? 128 : 64);
        load_pairs(is_fp32, keys + place, &first, &second);
        _mm_prefetch(next + place, _MM_HINT_T0);
        if (is_fp32) _mm_prefetch(next + place + 64, _MM_HINT_T0);
        RH_UNROLL for (int h = 0; h < heads; h++) {
            const float *query = queries + (size_t)h * head_dim + 2 * pair;
            first_sums[h] = v_fma(first, v_set(query[0]), first_sums[h]);
            second_sums[h] = v_fma(second, v_set(query[1]), second_sums[h]);
        }
    }
    RH_UNROLL for (int h = 0; h < heads; h++)
        v_store(scores + h * stride, v_add(first_sums[h], second_sums[h]));
}

/* Turns scores of `tokens` tokens into weights that are not yet divided by their sum, which is returned. */
static float soften(float *scores, int tokens, int padded) {
    rh_vec most = v_set(-INFINITY), sum = v_zero();
    for (int t = tokens; t < padded; t++) scores[t] = -INFINITY;
    for (int t = 0; t < padded; t += 16) most = v_max(most, v_load(scores + t));
    const rh_vec largest = v_set(v_largest(most));
    for (int t = 0; t < padded; t += 16) {
        rh_vec weight = v_keep(v_first(tokens - t), rh_exp(v_sub(v_load(scores + t), largest)));
        v_store(scores + t, weight);
        sum = v_add(sum, weight);
    }
    return v_sum(sum);
}

/* Adds weight x value over all tokens for `vectors` x 16 channels. */
RH_INLINE void mix_channels(const int is_fp32, const int heads, const int vectors, const rh_decoder *decoder,
                            const rh_pass *pass, int layer, int kv_head, const int32_t *table, int tokens, int channel,
                            const float *weights, size_t stride, const float *sums, float *mixed) {
    const int head_dim = decoder->head_dim;
    rh_vec out[MOST_HEADS][CHANNEL_VECTORS];
    RH_UNROLL for (int h = 0; h < heads; h++)
        RH_UNROLL for (int v = 0; v < vectors; v++) out[h][v] = v_zero();
    for (int start = 0; start < tokens; start += RH_BLOCK_TOKENS) {
        const char *values = kv_block(decoder, pass, layer, 1, table[start / RH_BLOCK_TOKENS], kv_head);
        const int after = start + RH_BLOCK_TOKENS;
        const char *next = kv_block(decoder, pass, layer, 1, table[(after < tokens ? after : start) / RH_BLOCK_TOKENS], kv_head);
        const int count = tokens - start < RH_BLOCK_TOKENS ? tokens - start : RH_BLOCK_TOKENS;
        for (int token = 0; token < count; token += 2) {
            const size_t place = ((size_t)token * head_dim + 2 * channel) * (is_fp32 ? 4 : 2);
            const int has_second = token + 1 < count;
            RH_UNROLL for (int v = 0; v < vectors; v++) {
                rh_vec first, second;
                const size_t lines = place + (size_t)v * (is_fp32 ? 128 : 64);
                load_pairs(is_fp32, values + lines, &first, &second);
                _mm_prefetch(next + lines, _MM_HINT_T0);
                if (is_fp32) _mm_prefetch(next + lines + 64, _MM_HINT_T0);
                RH_UNROLL for (int h = 0; h < heads; h++) {
                    const float *weight = weights + h * stride + start + token;
                    out[h][v] = v_fma(first, v_set(weight[0]), out[h][v]);
                    if (has_second) out[h][v] = v_fma(second, v_set(weight[1]), out[h][v]);
                }
            }
        }
    }
    RH_UNROLL for (int h = 0; h < heads; h++) {
        const rh_vec share = v_set(1.0f / sums[h]);
        RH_UNROLL for (int v = 0; v < vectors; v++)
            v_store(mixed + (size_t)h * head_dim + channel + 16 * v, v_mul(out[h][v], share));
    }
}

RH_INLINE void attend_heads(const int is_fp32, const int heads, const rh_decoder *decoder, const rh_pass *pass, int layer,
                            int row, int kv_head, int head, float *scores) {
    const int head_dim = decoder->head_dim, tokens = pass->positions[row] + 1;
    const int padded = (tokens + RH_BLOCK_TOKENS - 1) / RH_BLOCK_TOKENS * RH_BLOCK_TOKENS;
    const size_t stride = (size_t)padded;
    const int32_t *table = pass->tables + pass->table_starts[row];
    const float *queries = pass->wide + (size_t)row * decoder->layers[layer].qkv.outputs + (size_t)head * head_dim;
    float *mixed = pass->mixed + ((size_t)row * decoder->heads + head) * head_dim;
    float sums[MOST_HEADS];
    const char *keys = kv_block(decoder, pass, layer, 0, table[0], kv_head);
    for (int start = 0; start < tokens; start += RH_BLOCK_TOKENS) {
        const int after = start + RH_BLOCK_TOKENS, is_last = after >= tokens;
        const char *next = kv_block(decoder, pass, layer, is_last, is_last ? table[0] : table[after / RH_BLOCK_TOKENS], kv_head);
        score_block(is_fp32, heads, keys, next, queries, head_dim, scores + start, stride);
        keys = next;
    }
    for (int h = 0; h < heads; h++) {
        if (decoder->slopes) /* by the token's own position, not its distance: rounded as the reference rounds */
            for (int t = 0; t < tokens; t++) scores[h * stride + t] += decoder->slopes[head + h] * (float)t;
        sums[h] = soften(scores + h * stride, tokens, padded);
    }
    int channel = 0;
    for (; channel + 16 * CHANNEL_VECTORS <= head_dim; channel += 16 * CHANNEL_VECTORS)
        mix_channels(is_fp32, heads, CHANNEL_VECTORS, decoder, pass, layer, kv_head, table, tokens, channel, scores,
                     stride, sums, mixed);
    for (; channel < head_dim; channel += 16)
        mix_channels(is_fp32, heads, 1, decoder, pass, layer, kv_head, table, tokens, channel, scores, stride, sums,
                     mixed);
}

#define HEADS(count)                                                                                  \
    case count:                                                                                       \
        if (decoder->kv_kind == RH_FP32)                                                              \
            attend_heads(1, count, decoder, pass, layer, row, kv_head, head, scores);                 \
        else                                                                                          \
            attend_heads(0, count, decoder, pass, layer, row, kv_head, head, scores);                 \
        break;

/* All query heads of one key head, for one row. scores: room for MOST_HEADS x the row's tokens, rounded up to blocks. */
void rh_attend(const rh_decoder *decoder, const rh_pass *pass, int layer, int row, int kv_head, float *scores) {
    const int group = decoder->heads / decoder->kv_heads;
    for (int done = 0; done < group; done += MOST_HEADS) {
        const int head = kv_head * group + done;
        switch (group - done < MOST_HEADS ? group - done : MOST_HEADS) {
            HEADS(1)
            HEADS(2)
#if MOST_HEADS == 4
            HEADS(3)
            HEADS(4)
#endif
        }
    }
}
