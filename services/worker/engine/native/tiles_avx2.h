/* Tiles of up to 6 rows by half a panel, or 3 (bf16 and int8: 2) by a whole one: the sums fill 12 of the 16 registers at
 * most. Each half reads its own lines of the panel. */
#define TILE_ROWS 6
#define EACH_COUNT(DO, kind) DO(kind, 1) DO(kind, 2) DO(kind, 3) DO(kind, 4) DO(kind, 5) DO(kind, 6)
#define HALVES_fp32(rows) ((rows) <= 3 ? 2 : 1)
#define HALVES_bf16(rows) ((rows) <= 2 ? 2 : 1)
#define HALVES_int8(rows) ((rows) <= 2 ? 2 : 1)
/* int8: weights on their way take 4 registers for each half, so that 4 rows are the most. */
static const int MOST_ROWS[3] = {6, 6, 4};

RH_INLINE void tile_fp32(const product *p, const tile_place *at, const int rows, const int halves) {
    const size_t inputs = p->linear->inputs;
    const float *w = (const float *)at->weights + RH_LANES * at->half;
    const float *x = (const float *)p->x->data + at->row * inputs;
    const char *ahead = at->ahead;
    rh_vec sums[TILE_ROWS][2];
    FOR_SUMS sums[r][h] = begin(p, at, halves, r, h);
    for (int k = at->from; k < at->to; k++, w += RH_PANEL) {
        ahead = fetch(ahead, at->ahead_gap, halves);
        FOR_ROWS {
            const rh_vec input = v_set(x[r * inputs + k]);
            FOR_HALVES sums[r][h] = v_fma(v_load(w + RH_LANES * h), input, sums[r][h]);
        }
    }
    FOR_SUMS finish(p, at, halves, r, h, sums[r][h]);
}

/* bf16 weights are the upper halves of fp32 numbers. All rows take the first of each pair, then all the second: weights on
 * their way are then few enough for the registers. */
RH_INLINE void tile_bf16(const product *p, const tile_place *at, const int rows, const int halves) {
    const size_t inputs = p->linear->inputs;
    const uint16_t *w = (const uint16_t *)at->weights + 2 * RH_LANES * at->half;
    const float *x = (const float *)p->x->data + at->row * inputs;
    const char *ahead = at->ahead;
    rh_vec sums[TILE_ROWS][2];
    FOR_SUMS sums[r][h] = begin(p, at, halves, r, h);
    for (int k = at->from; k < at->to; k += 2, w += 2 * RH_PANEL) {
        ahead = fetch(ahead, at->ahead_gap, halves);
        FOR_HALVES {
            const rh_vec even = v_even_bf16(w + 2 * RH_LANES * h);
            FOR_ROWS sums[r][h] = v_fma(even, v_set(x[r * inputs + k]), sums[r][h]);
        }
        FOR_HALVES {
            const rh_vec odd = v_odd_bf16(w + 2 * RH_LANES * h);
            FOR_ROWS sums[r][h] = v_fma(odd, v_set(x[r * inputs + k + 1]), sums[r][h]);
        }
    }
    FOR_SUMS finish(p, at, halves, r, h, sums[r][h]);
}

/* Four products of bytes for each output, exactly: even bytes and odd ones as 16-bit numbers, whose products are added in
 * pairs. (Multiplying bytes as such would saturate.) */
RH_INLINE __m256i even_bytes(__m256i unsigned_bytes) { return _mm256_and_si256(unsigned_bytes, _mm256_set1_epi16(0xFF)); }
RH_INLINE __m256i odd_bytes(__m256i unsigned_bytes) { return _mm256_srli_epi16(unsigned_bytes, 8); }
RH_INLINE __m256i multiply_quads(__m256i counts, __m256i even, __m256i odd, __m256i even_inputs, __m256i odd_inputs) {
    counts = _mm256_add_epi32(counts, _mm256_madd_epi16(even, even_inputs));
    return _mm256_add_epi32(counts, _mm256_madd_epi16(odd, odd_inputs));
}

RH_INLINE void tile_int8(const product *p, const tile_place *at, const int rows, const int halves) {
    const size_t inputs = p->linear->inputs, groups = inputs / RH_GROUP;
    const uint8_t *w = (const uint8_t *)at->weights + 4 * RH_LANES * at->half;
    const int8_t *x = (const int8_t *)p->x->data + at->row * inputs + at->from;
    const float *scales = p->x->scales + at->row * groups;
    const int32_t *offsets = p->x->offsets + at->row * groups;
    const char *ahead = at->ahead;
    rh_vec sums[TILE_ROWS][2];
    FOR_SUMS sums[r][h] = begin(p, at, halves, r, h);
    for (int group = at->from / RH_GROUP; group < at->to / RH_GROUP; group++, x += RH_GROUP) {
        rh_ints counts[TILE_ROWS][2];
        FOR_SUMS counts[r][h] = i_set(offsets[r * groups + group]);
        for (int quad = 0; quad < RH_GROUP; quad += 4, w += 4 * RH_PANEL) {
            ahead = fetch(ahead, at->ahead_gap, halves);
            FOR_HALVES {
                const rh_ints weights = i_load(w + 4 * RH_LANES * h);
                const rh_ints even = {even_bytes(weights.low), even_bytes(weights.high)};
                const rh_ints odd = {odd_bytes(weights.low), odd_bytes(weights.high)};
                FOR_ROWS {
                    const __m256i input = _mm256_set1_epi32(*(const int32_t *)(x + r * inputs + quad));
                    const __m256i even_inputs = _mm256_srai_epi16(_mm256_slli_epi16(input, 8), 8);
                    const __m256i odd_inputs = _mm256_srai_epi16(input, 8);
                    counts[r][h].low = multiply_quads(counts[r][h].low, even.low, odd.low, even_inputs, odd_inputs);
                    counts[r][h].high = multiply_quads(counts[r][h].high, even.high, odd.high, even_inputs, odd_inputs);
                }
            }
        }
        const uint16_t *weight_scales = p->linear->scales + (at->panel * groups + group) * RH_PANEL + RH_LANES * at->half;
        FOR_HALVES {
            const rh_vec weight_scale = v_widen(weight_scales + RH_LANES * h);
            FOR_ROWS {
                const rh_vec scale = v_mul(v_set(scales[r * groups + group]), weight_scale);
                sums[r][h] = v_fma(v_of_ints(counts[r][h]), scale, sums[r][h]);
            }
        }
    }
    FOR_SUMS finish(p, at, halves, r, h, sums[r][h]);
}
