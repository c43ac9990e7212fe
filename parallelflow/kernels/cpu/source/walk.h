// Decays a channel: how a chunk's readers see its writers, by walking through the tokens and decaying what has been
// written, as the state does. A row p sees every earlier token's writer q through
//
//     M_pq = Σ_k r_p[k] W_q[k],        W_q[k] <- e^{g_t[k]} W_q[k] at each token t after q's
//
// before that token's decay if it is raw. Pulled back, dr_p = Σ_q dM_pq W_q, and W's adjoint walks from the last token to
// the first: dW_q += Σ_p dM_pq r_p, dW_q <- e^{g_t} dW_q. Tokens are taken a few at a time while W is in registers.
#pragma once

#include <type_traits>

#include "decay.h"

constexpr long ROW = row_distance(ROWS);  // of matrices between a chunk's rows
constexpr int SPARE_ROWS = 16;            // that a walk may touch beyond a chunk's last, of one kind

// Readers of one kind: r [.., deep], and M or dM [.., ROW].
struct Walkers {
    float *rows, *matrix;
};

struct Walk {
    int tokens, depth, each, reads;  // `each` writers and `reads` readers a token, and a query
    bool raw;
    long deep;
    const float* steps;
    Walkers read, query;

    // M up to what a token's own writers add; `turned` [depth, ROW] is room for the writers.
    void see(const float* writers, float* turned) const {
        groups([&](auto count, auto rows, auto before, auto queries, int at) {
            transpose(tokens * each, depth, writers, deep, turned, ROW);
            for (int first = 0; first < tokens; first += count)
                for (int j = 0; j < (first + count) * each && j < ROWS; j += LANES) {
                    if (j + LANES <= first * each) {
                        see_from<count, rows, before, queries, false>(turned + j, first, j, at);
                    } else {
                        see_from<count, rows, before, queries, true>(turned + j, first, j, at);
                    }
                }
        });
    }

    // dr, added to, without what a token's own writers add; `written` is room for W.
    void pull_readers(const float* writers, float* written, float* d_read, float* d_query) const {
        groups([&](auto count, auto rows, auto before, auto queries, int at) {
            memcpy(written, writers, tokens * each * deep * sizeof(float));
            for (int first = 0; first < tokens; first += count)
                for (int k = 0; k < depth; k += LANES)
                    pull_to_readers<count, rows, before, queries>(written + k, d_read + k, d_query + k, first, k, at);
        });
    }

    // dW likewise, all of it; `room` is for a part of it.
    void pull_writers(float* d_written, float* room) const {
        const long size = tokens * each * deep;
        groups([&](auto count, auto rows, auto before, auto queries, int at) {
            float* to = at ? room : d_written;
            memset(to, 0, size * sizeof(float));
            for (int first = (tokens - 1) / count * count; first >= 0; first -= count)
                for (int k = 0; k < depth; k += LANES)
                    pull_to_writers<count, rows, before, queries>(to + k, first, k, at);
            for (long n = 0; at && n < size; n++) d_written[n] += room[n];
        });
    }

  private:
    template <int n>
    using Constant = std::integral_constant<int, n>;

    // Calls `use(tokens at once, readers a token, raw, with the queries, first reader)` for a few readers at a time.
    template <typename Use>
    void groups(Use use) const {
        if (raw) {
            groups<1>(use);
        } else {
            groups<0>(use);
        }
    }

    template <int before, typename Use>
    void groups(Use use) const {
        constexpr Constant<before> BEFORE;
        constexpr Constant<1> ONE;
        constexpr Constant<2> TWO;
        constexpr Constant<4> FOUR;
        constexpr Constant<0> NONE;
        int at = reads >= 4 ? 4 : reads >= 2 ? 2 : reads;
        if (at == 4) use(TWO, FOUR, BEFORE, ONE, 0);
        if (at == 2) use(TWO, TWO, BEFORE, ONE, 0);
        if (at == 1) use(FOUR, ONE, BEFORE, ONE, 0);
        if (at == 0) use(FOUR, NONE, NONE, ONE, 0);
        for (; reads - at >= 4; at += 4) use(TWO, FOUR, BEFORE, NONE, at);
        for (; reads - at >= 2; at += 2) use(TWO, TWO, BEFORE, NONE, at);
        if (at < reads) use(TWO, ONE, BEFORE, NONE, at);
    }

    template <int COUNT, int READS, bool RAW, bool QUERY, bool MASKED>
    void see_from(float* turned, int first, int column, int at) const {
        Floats seen[COUNT][READS + QUERY] = {};
        Integers decays[COUNT];
        for (int r = 0; r < COUNT; r++) decays[r] = counting() + column < (first + r) * each;
        const float* row = read.rows + (first * reads + at) * deep;
        const float* queries = query.rows + first * deep;
        const float* step = steps + first * deep;
        const long next = reads * deep;
        for (int k = 0; k < depth; k++) {
            Floats written = load(turned + k * ROW);
#pragma GCC unroll 8
            for (int r = 0; r < COUNT; r++) {
                const Floats before = written, after = step[r * deep + k] * written;
                written = MASKED ? (decays[r] ? after : written) : after;
#pragma GCC unroll 8
                for (int p = 0; p < READS; p++) seen[r][p] += row[r * next + p * deep + k] * (RAW ? before : written);
                if constexpr (QUERY) seen[r][READS] += queries[r * deep + k] * written;
            }
            store(turned + k * ROW, written);
        }
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; r++) {
            if (first + r >= tokens) break;
#pragma GCC unroll 8
            for (int p = 0; p < READS; p++)
                store(read.matrix + ((first + r) * reads + at + p) * ROW + column, seen[r][p]);
            if constexpr (QUERY) store(query.matrix + (first + r) * ROW + column, seen[r][READS]);
        }
    }

    // The tokens of a block that come after a writer's own: all of them, or some.
    template <int COUNT>
    struct Later {
        int own, end;

        template <bool ALL>
        bool has(int r) const { return ALL || (r > own && r < end); }
    };

    // `meet` for every writer that one of COUNT tokens from `first` on may read: told whether all of them do.
    template <int COUNT, typename Meet>
    void each_writer(int first, const Meet& meet) const {
        const int here = first + COUNT < tokens ? first + COUNT : tokens;
        const int earlier = here == first + COUNT ? first * each : 0;
        for (int q = 0; q < earlier; q++) meet(std::true_type{}, q);
        for (int q = earlier; q < here * each; q++) meet(std::false_type{}, q);
    }

    template <int COUNT, int READS, bool RAW, bool QUERY>
    void pull_to_readers(float* written, float* d_read, float* d_query, int first, int k, int at) const {
        Floats pulled[COUNT][READS + QUERY] = {}, step[COUNT];
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; r++) step[r] = load(steps + (first + r) * deep + k);
        const float* matrix = read.matrix + (first * reads + at) * ROW;
        const float* queries = query.matrix + first * ROW;
        const long next = reads * ROW;
        const auto meet = [&](auto all, int q) {
            const Later<COUNT> later{q / each - first, tokens - first};
            Floats now = load(written + q * deep);
#pragma GCC unroll 8
            for (int r = 0; r < COUNT; r++) {
                if (!later.template has<all>(r)) continue;
                const Floats before = now;
                now *= step[r];
#pragma GCC unroll 8
                for (int p = 0; p < READS; p++) pulled[r][p] += matrix[r * next + p * ROW + q] * (RAW ? before : now);
                if constexpr (QUERY) pulled[r][READS] += queries[r * ROW + q] * now;
            }
            store(written + q * deep, now);
        };
        each_writer<COUNT>(first, meet);
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; r++) {
            if (first + r >= tokens) break;
#pragma GCC unroll 8
            for (int p = 0; p < READS; p++) {
                float* to = d_read + ((first + r) * reads + at + p) * deep;
                store(to, load(to) + pulled[r][p]);
            }
            if constexpr (QUERY) {
                float* to = d_query + (first + r) * deep;
                store(to, load(to) + pulled[r][READS]);
            }
        }
    }

    template <int COUNT, int READS, bool RAW, bool QUERY>
    void pull_to_writers(float* d_written, int first, int k, int at) const {
        Floats rows[COUNT][READS + QUERY], step[COUNT];
#pragma GCC unroll 8
        for (int r = 0; r < COUNT; r++) {
            step[r] = load(steps + (first + r) * deep + k);
#pragma GCC unroll 8
            for (int p = 0; p < READS; p++) rows[r][p] = load(read.rows + ((first + r) * reads + at + p) * deep + k);
            if constexpr (QUERY) rows[r][READS] = load(query.rows + (first + r) * deep + k);
        }
        const float* matrix = read.matrix + (first * reads + at) * ROW;
        const float* queries = query.matrix + first * ROW;
        const long next = reads * ROW;
        const auto meet = [&](auto all, int q) {
            const Later<COUNT> later{q / each - first, tokens - first};
            Floats now = load(d_written + q * deep);
#pragma GCC unroll 8
            for (int r = COUNT - 1; r >= 0; r--) {
                if (!later.template has<all>(r)) continue;
                if constexpr (QUERY) now += queries[r * ROW + q] * rows[r][READS];
                if (RAW) now *= step[r];
#pragma GCC unroll 8
                for (int p = 0; p < READS; p++) now += matrix[r * next + p * ROW + q] * rows[r][p];
                if (!RAW) now *= step[r];
            }
            store(d_written + q * deep, now);
        };
        each_writer<COUNT>(first, meet);
    }
};
