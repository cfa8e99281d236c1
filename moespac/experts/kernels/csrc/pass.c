/* A pass of a plain decoder, run on from layer to layer for as long as there is nothing that Python would have to
 * decide: the experts that its router asks for lie in host memory, or it was said beforehand what makes way for them. */
#include "pass.h"

#include <string.h>

#include "memory.h"

static int attend(const Model *model, const Run *run) {
    const Shape *shape = decoder_shape(model->decoder);
    int64_t at = run->row * run->tokens * model->top_k;
    float *store = run->store + run->layer * 2 * shape->groups * run->room * shape->padded;
    return decoder_layer(model->decoder, &model->layers[run->layer], run->x, run->block, (int)run->tokens,
                                 store, run->room, run->start, run->cos, run->sin, run->normed, run->index + at,
                                 run->shares + at) == 0;
}

static int finish(const Model *model, const Run *run) {
    int64_t skipped = (run->tokens - run->keep) * decoder_shape(model->decoder)->hidden;
    return decoder_head(model->decoder, model->head, model->norm, run->x + skipped,
                                run->block ? run->block + skipped : NULL, (int)run->keep, run->logits) == 0;
}

static void embed(const Model *model, const Run *run) {
    int64_t hidden = decoder_shape(model->decoder)->hidden;
    for (int64_t t = 0; t < run->tokens; t++)
        memcpy(run->x + t * hidden, model->embedding + run->ids[t] * hidden, (size_t)(4 * hidden));
}

/* The caller has much to hear of reads that landed. */
static int must_tell(const HostMemory *memory) { return memory && 2 * memory->landings > memory->room; }

static int run_on(const Model *model, const Experts *experts, Run *run, int64_t most) {
    int64_t last = run->row + most;
    if (run->layer == 0) embed(model, run);
    for (; run->layer < model->layer_count; run->layer++) {
        if (run->row == last || must_tell(experts->memory)) return PAUSED;
        if (!attend(model, run)) return FAILED;
        run->block = NULL;
        if (model->layers[run->layer].up.matrix.rows) continue;
        int state = experts->kernel ? run_experts(model, experts, run) : ASKS;
        if (state != PAUSED) return state;
        run->block = model->block;
        run->row++;
    }
    return finish(model, run) ? OVER : FAILED;
}

/* Go on with `run`. OVER: its logits are there. PAUSED: experts of `most` layers were computed, or there is much to
 * hear. ASKS: the experts of run->layer, which are run->row, are the caller's, of run->normed; call again with
 * run->block, and both one further. BROKEN: an expert could not be read. FAILED: memory is short. */
EXPORT int moespac_pass(const Model *model, const Experts *experts, Run *run, int64_t most) {
    Pool *pool = experts->kernel ? kernel_pool(experts->kernel) : NULL;
    pool = decoder_borrow(model->decoder, pool);
    pool_stay_awake(pool, 1);
    run->began = now();
    run->slice_count = 0;
    int state = run_on(model, experts, run, most);
    pool_stay_awake(pool, 0);
    decoder_borrow(model->decoder, NULL);
    return state;
}
